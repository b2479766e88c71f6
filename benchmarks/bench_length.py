"""The time for a token as rows grow, and how much of the growth is attention's.

    python benchmarks/bench_length.py --model DIR [--layers 4] --batch-tokens 2048 --rounds 3 --json length.json

Every update has the same number of tokens: few long rows or many short ones. All lengths are measured in turn in one process, and
attention (forward and backward, all blocks) also alone, on arrays of the same shapes. What is left when it is taken out should not
grow.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_task import DEFAULTS, SUPERVISED_SHARE, first_blocks, synthetic_rows, write_lines
from print_roofline import parts_of

from mlx_fish.adapters.spec import AdapterSpec, choose_layers, initial_arrays
from mlx_fish.backends.choose import choose_backend, load_backend
from mlx_fish.backends.protocol import optimizer_step
from mlx_fish.data.order import Updates
from mlx_fish.models.folder import ModelFolder
from mlx_fish.models.hub import find_model

LENGTHS = (128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Line:
    """Microseconds for a token in updates of rows of `length`, of attention alone, and the operations counted, in MFLOP a token."""

    length: int
    whole: float
    attention: float
    mflop: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hub id or `tiny`")
    parser.add_argument("--layers", type=int, help="only the model's first blocks [default: all]")
    parser.add_argument("--batch-tokens", type=int, default=LENGTHS[-1], help="tokens of every update")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of each length, in turn")
    parser.add_argument("--grad-checkpoint", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    if any(options.batch_tokens % length for length in options.lengths):
        parser.error(f"--batch-tokens {options.batch_tokens}: a multiple of every length was expected.")
    choose_backend("mlx")  # before transformers is imported
    with first_blocks(find_model(options.model), options.layers) as folder:
        lines = measure(folder, options)
    print(table(lines))
    write_lines(options, lines)


def measure(folder: ModelFolder, options: argparse.Namespace) -> list[Line]:
    backend = load_backend(folder, name="mlx")
    spec = AdapterSpec.uniform(choose_layers(folder.linear_layers), rank=options.rank, alpha=2 * options.rank)
    backend.attach(spec, initial_arrays(spec, DEFAULTS.seed), grad_checkpoint=options.grad_checkpoint)
    updates: dict[int, Callable[[], Any]] = {}
    attentions: dict[int, Callable[[], Any]] = {}
    for length in options.lengths:
        number = options.batch_tokens // length
        rows = synthetic_rows(folder, number, length)
        batches = Updates(rows, batch_size=number, accumulation=1, seed=DEFAULTS.seed)[0]
        updates[length] = lambda batches=batches: optimizer_step(backend, batches, DEFAULTS.learning_rate, [0])()  # type: ignore[misc]
        attentions[length] = attention_alone(folder, number, length, backend.dtype)
    whole = in_turn(updates, options.rounds)
    alone = in_turn(attentions, options.rounds)
    blocks = int(folder.config["num_hidden_layers"])

    def microseconds(seconds: float) -> float:
        return 1e6 * seconds / options.batch_tokens

    def mflop(length: int) -> float:
        settings = {"supervised": SUPERVISED_SHARE, "batch_tokens": options.batch_tokens, "rank": options.rank}
        return sum(part.flops for part in parts_of(folder, length=length, width=4, **settings)) / 1e6  # type: ignore[arg-type]

    return [
        Line(length, microseconds(whole[length]), blocks * microseconds(alone[length]), mflop(length))
        for length in options.lengths
    ]


def in_turn(calls: dict[int, Callable[[], Any]], rounds: int) -> dict[int, float]:
    """Median seconds of each call; the first of each compiles, and is not timed."""
    times: dict[int, list[float]] = {length: [] for length in calls}
    for number in range(rounds + 1):
        for length, call in calls.items():
            started = time.perf_counter()
            call()
            if number:
                times[length].append(time.perf_counter() - started)
    return {length: statistics.median(found) for length, found in times.items()}


def attention_alone(folder: ModelFolder, number: int, length: int, dtype: str) -> Callable[[], Any]:
    """One block's attention and its gradients, on random arrays."""
    import mlx.core as mx

    from mlx_fish.backends.mlx.attention import causal_attention

    config = folder.config
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    shapes = [*((number, count, length, size) for count in (heads, keys, keys)), (number * length, heads * size)]
    *inputs, cotangent = (mx.random.normal(shape, key=mx.random.key(0)).astype(getattr(mx, dtype)) for shape in shapes)
    mx.eval(inputs, cotangent)

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return causal_attention(q * size**-0.5, k, v)

    return lambda: mx.eval(mx.vjp(attend, inputs, [cotangent]))


def table(lines: list[Line]) -> str:
    """Markdown; growth is beside the shortest rows."""
    first = lines[0]
    shown = [
        "| tokens a row | µs a token | growth | attention alone, µs | the rest, µs | growth of the rest | MFLOP a token | growth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        rest, first_rest = line.whole - line.attention, first.whole - first.attention
        shown.append(
            f"| {line.length} | {line.whole:.0f} | {line.whole / first.whole:.2f} | {line.attention:.0f} | {rest:.0f} "
            f"| {rest / first_rest:.2f} | {line.mflop:.1f} | {line.mflop / first.mflop:.2f} |"
        )
    return "\n".join(shown)


if __name__ == "__main__":
    main()
