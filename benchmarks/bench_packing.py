"""Packed rows beside rows padded in length buckets: useful tokens a second, padding, shapes and memory of the same rows.

    python benchmarks/bench_packing.py --model DIR --layers 4 --sets short mixed long --json packing.json

Each set is trained one epoch in both layouts, an update of one and an update of the other in turn, in one process. The updates are
those of `train`: four rows of like length, in an order of its own for each layout. A shape is compiled before the clock runs.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from batch_shapes import shape_of
from bench_task import DEFAULTS, first_blocks, fish_rows, synthetic_rows, write_lines

from mlx_fish.adapters.spec import AdapterSpec, choose_layers, initial_arrays
from mlx_fish.backends.choose import choose_backend, load_backend
from mlx_fish.backends.protocol import Backend, optimizer_step
from mlx_fish.data.batches import Batch
from mlx_fish.data.order import Updates
from mlx_fish.data.tokens import Tokens
from mlx_fish.models.folder import ModelFolder
from mlx_fish.models.hub import find_model

Lengths = Callable[[np.random.Generator, int], np.ndarray]


def log_normal(generator: np.random.Generator, number: int) -> np.ndarray:
    return np.exp(generator.normal(np.log(143), 0.8, number)).astype(int).clip(8, 1024)


# name -> (the lengths of its rows in tokens, None for the fish data's own; how many rows)
SETS: dict[str, tuple[Lengths | None, int]] = {
    "short": (lambda generator, number: generator.integers(8, 60, number), 120),
    "fish": (None, 64),
    "mixed": (log_normal, 80),
    "long": (lambda generator, number: generator.integers(256, 1025, number), 24),
}


@dataclass
class Line:
    """One layout of one set; seconds are those of all its updates."""

    rows: str
    packing: bool
    tokens: int
    computed: int
    shapes: int
    seconds: float
    peak: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hub id or `tiny`")
    parser.add_argument("--layers", type=int, help="only the model's first blocks [default: all]")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    choose_backend("mlx")  # before transformers is imported
    with first_blocks(find_model(options.model), options.layers) as folder:
        backend = load_backend(folder, name="mlx")
        spec = AdapterSpec.uniform(choose_layers(folder.linear_layers), rank=options.rank, alpha=2 * options.rank)
        backend.attach(spec, initial_arrays(spec, DEFAULTS.seed))
        lines = [line for name in options.sets for line in measure(backend, name, rows_of(folder, name), options)]
    print(table(lines))
    write_lines(options, lines)


def rows_of(folder: ModelFolder, name: str) -> list[Tokens]:
    lengths, number = SETS[name]
    if lengths is None:
        return fish_rows(folder, number)
    found = lengths(np.random.default_rng(0), number)
    return [
        Tokens(row.ids[:length], row.supervised[-length:], row.where, False)
        for row, length in zip(synthetic_rows(folder, number, int(max(found))), found, strict=True)
    ]


def measure(backend: Backend, name: str, rows: list[Tokens], options: argparse.Namespace) -> list[Line]:
    """Both layouts of one set."""
    layouts = [
        Updates(rows, batch_size=options.batch_size, accumulation=1, seed=DEFAULTS.seed, packing=packing)
        for packing in (True, False)
    ]
    lines = [Line(name, layout.packing, 0, 0, 0, 0.0, 0) for layout in layouts]
    for layout, line in zip(layouts, lines, strict=True):
        by_shape = {shape_of(batch): batch for step in range(layout.per_epoch) for batch in layout[step]}
        line.shapes = len(by_shape)
        for batch in by_shape.values():
            run(backend, [batch])
    for step in range(layouts[0].per_epoch):
        for layout, line in zip(layouts, lines, strict=True):
            batches = layout[step]
            backend.reset_peak_memory()
            line.seconds += run(backend, batches)
            line.peak = max(line.peak, backend.peak_memory())
            line.tokens += sum(batch.num_tokens for batch in batches)
            line.computed += sum(batch.num_computed for batch in batches)
        print(f"{name}: update {step + 1} of {layouts[0].per_epoch}", file=sys.stderr)
    return lines


def run(backend: Backend, batches: list[Batch]) -> float:
    started = time.perf_counter()
    optimizer_step(backend, batches, DEFAULTS.learning_rate, [0])()
    return time.perf_counter() - started


def table(lines: list[Line]) -> str:
    """Markdown; the ratio is of packed to padded tokens a second."""
    shown = [
        "| rows | layout | useful tokens | padding | shapes | tokens/s | ratio | peak, weights included |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for packed, padded in zip(lines[::2], lines[1::2], strict=True):
        for line in (packed, padded):
            ratio = f"{packed.tokens_per_second / padded.tokens_per_second:.2f}" if line is packed else ""
            shown.append(
                f"| {line.rows} | {'packed' if line.packing else 'padded'} | {line.tokens} | {1 - line.tokens / line.computed:.1%} "
                f"| {line.shapes} | {line.tokens_per_second:.1f} | {ratio} | {line.peak / 1e9:.2f} GB |"
            )
    return "\n".join(shown)


if __name__ == "__main__":
    main()
