"""Say whether two runs agree, and by how much: the losses step by step, and the adapters that came out.

    python tools/loss_compare.py finetuned_model other_model --tolerance 1e-4 --adapter-tolerance 1e-3

A and B are output folders of `mlx-fish train`. Exits with 1 when they do not agree.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from mlx_fish.adapters.peft import WEIGHTS_FILE, load_adapter
from mlx_fish.errors import FishError
from mlx_fish.tracking.jsonl import LOG_FILE

COMPARED = ("loss", "eval_loss", "lr", "grad_norm")
# A gradient's norm is shown and not judged: where it is small, rounding is a large part of it.
JUDGED = ("loss", "eval_loss", "lr")


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """Figure -> {step: value} from a run's log."""
    path = folder / LOG_FILE
    if not path.is_file():
        raise FishError(f"{folder} has no {LOG_FILE}; an output folder of `mlx-fish train` was expected.")
    curves: dict[str, dict[int, float]] = {name: {} for name in COMPARED}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name in COMPARED:
            if name in entry:
                curves[name][entry["current_steps"]] = entry[name]
    return curves


def compare_curves(a: dict[int, float], b: dict[int, float]) -> tuple[float, int]:
    """The largest relative difference and the step that it is found at."""
    if a.keys() != b.keys():
        raise FishError(
            f"the runs report different steps ({len(a)} and {len(b)} figures); the same ones were expected."
        )
    return max((abs(a[step] - b[step]) / max(abs(a[step]), abs(b[step]), 1e-12), step) for step in a)


def compare_adapters(a: Path, b: Path) -> tuple[float, float, str]:
    """|a - b| / |a| in the 2-norm: of the adapters as wholes, of the furthest matrix, and that matrix's name.

    A matrix alone is shown and not judged: AdamW's first updates are the gradient's sign, so that an entry whose gradient is
    nearly zero may go either way by rounding, and counts for much in a small matrix.
    """
    first, second = load_adapter(a).arrays, load_adapter(b).arrays
    if first.keys() != second.keys():
        raise FishError(f"{a} and {b} do not adapt the same layers.")
    apart = {name: float(np.linalg.norm(array - second[name])) for name, array in first.items()}
    sizes = {name: float(np.linalg.norm(array)) for name, array in first.items()}
    whole = float(np.linalg.norm(list(apart.values())) / max(np.linalg.norm(list(sizes.values())), 1e-12))
    return whole, *max((apart[name] / max(sizes[name], 1e-12), name) for name in apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="for losses and learning rates, relative")
    parser.add_argument("--adapter-tolerance", type=float, default=1e-3, help="for the whole, relative in the 2-norm")
    options = parser.parse_args()
    agree = True
    try:
        curves_a, curves_b = read_curves(options.a), read_curves(options.b)
        for name in COMPARED:
            if not curves_a[name] and not curves_b[name]:
                continue
            worst, step = compare_curves(curves_a[name], curves_b[name])
            judged = name in JUDGED
            agree &= not judged or worst <= options.tolerance
            verdict = "" if not judged else "  agrees" if worst <= options.tolerance else "  DIFFERS"
            print(f"{name:10} {len(curves_a[name]):5} values, at most {worst:.1e} apart (step {step}){verdict}")
        if all((folder / WEIGHTS_FILE).is_file() for folder in (options.a, options.b)):
            whole, worst, matrix = compare_adapters(options.a, options.b)
            agree &= whole <= options.adapter_tolerance
            verdict = "agrees" if whole <= options.adapter_tolerance else "DIFFERS"
            print(f"{'adapter':10} {whole:.1e} apart, no matrix by more than {worst:.1e} ({matrix})  {verdict}")
    except FishError as error:
        sys.exit(f"Error: {error}")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
