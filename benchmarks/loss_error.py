"""How far the single-pass loss and its gradient lie from float64, beside the plain computation in the same type.

    python benchmarks/loss_error.py --model DIR [--rows 64] [--json errors.json]

The model's own head, and hidden states that it makes of the fish data. Both ways meet the same numbers, rounded to the type first, and
so does the float64 reference: what is shown is the error of the arithmetic alone. The plain way is mlx-lm's: logits of the whole
vocabulary and `nn.losses.cross_entropy`. Errors are relative: of the mean loss, of a row's loss at worst, of the gradient's norm.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from bench_task import fish_rows

from mlx_fish.backends.choose import choose_backend
from mlx_fish.models.hub import find_model

Float64 = npt.NDArray[np.float64]
Found = tuple[Float64, Float64]  # losses (N,) and their gradients (N, D)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hub id or `tiny`")
    parser.add_argument("--rows", type=int, default=64, help="supervised positions")
    parser.add_argument("--json", type=Path, help="also write the errors here")
    options = parser.parse_args()
    choose_backend("mlx")  # before transformers is imported
    records = errors(options.model, options.rows)
    print("| type | way | mean loss | a row's loss | gradient |\n|---|---|---|---|---|")
    for record in records:
        numbers = " | ".join(f"{record[name]:.1e}" for name in ("mean_loss", "row_loss", "gradient"))
        print(f"| {record['dtype']} | {record['way']} | {numbers} |")
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def errors(model: str, rows: int) -> list[dict[str, float | str]]:
    """A record for each type and way."""
    hidden, weight, targets = head_inputs(model, rows)
    records: list[dict[str, float | str]] = []
    for dtype in ("float32", "bfloat16"):
        exact = in_float64(rounded(hidden, dtype), rounded(weight, dtype), targets)
        for way, compute in (("single pass", single_pass), ("plain", plain)):
            losses, gradients = compute(hidden, weight, targets, dtype)
            record: dict[str, float | str] = {"dtype": dtype, "way": way}
            record["mean_loss"] = abs(losses.mean() - exact[0].mean()) / exact[0].mean()
            record["row_loss"] = float((np.abs(losses - exact[0]) / exact[0].mean()).max())
            record["gradient"] = float(np.linalg.norm(gradients - exact[1]) / np.linalg.norm(exact[1]))
            records.append(record)
    return records


def head_inputs(
    model: str, rows: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Hidden states (N, D) of supervised positions, the head (V, D), targets (N,)."""
    import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
    import mlx.core as mx

    from mlx_fish.backends.mlx.loss import Head
    from mlx_fish.backends.mlx.model import load_model

    folder = find_model(model)
    loaded, _ = load_model(folder, lambda text: None)
    states, targets = [], []
    for row in fish_rows(folder, 1 + rows // 20):
        labelled = np.flatnonzero(row.supervised[1:])
        states.append(np.array(loaded.model(mx.array(row.ids[None, :-1]))[0].astype(mx.float32))[labelled])
        targets.append(row.ids[1:][labelled])
    weight = np.array(Head.of(loaded).weight.astype(mx.float32))
    return np.concatenate(states)[:rows], weight, np.concatenate(targets)[:rows]


def rounded(values: npt.NDArray[np.float32], dtype: str) -> Float64:
    import mlx.core as mx

    return np.array(mx.array(values).astype(getattr(mx, dtype)).astype(mx.float32)).astype(np.float64)


def in_float64(hidden: Float64, weight: Float64, targets: npt.NDArray[np.int32]) -> Found:
    logits = hidden @ weight.T
    logits -= logits.max(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    own = logits[rows, targets].copy()
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    logits /= total
    logits[rows, targets] -= 1
    return np.log(total[:, 0]) - own, logits @ weight


def single_pass(
    hidden: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], targets: npt.NDArray[np.int32], dtype: str
) -> Found:
    import mlx.core as mx

    from mlx_fish.backends.mlx.loss import Head, token_losses_and_gradients

    kind = getattr(mx, dtype)
    found = token_losses_and_gradients(
        Head(mx.array(weight).astype(kind)), mx.array(hidden).astype(kind), mx.array(targets)
    )
    losses, gradients = (np.array(array.astype(mx.float32)).astype(np.float64) for array in found)
    return losses, gradients


def plain(
    hidden: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], targets: npt.NDArray[np.int32], dtype: str
) -> Found:
    import mlx.core as mx
    import mlx.nn as nn

    kind = getattr(mx, dtype)
    head = mx.array(weight).astype(kind)

    def total(states: mx.array) -> tuple[mx.array, mx.array]:
        losses = nn.losses.cross_entropy(states @ head.T, mx.array(targets))
        return losses.sum(), losses

    (_, losses), gradients = mx.value_and_grad(total)(mx.array(hidden).astype(kind))
    found = (np.array(array.astype(mx.float32)).astype(np.float64) for array in (losses, gradients))
    return next(found), next(found)


if __name__ == "__main__":
    main()
