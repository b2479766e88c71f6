"""How much of what is computed is padding, and how many shapes a compiled step meets, in an epoch of the fish data.

python benchmarks/batch_shapes.py --model DIR --batch-size 4
"""

import argparse
import itertools

from bench_task import DEFAULTS, fish_rows

from mlx_fish.data.batches import Batch
from mlx_fish.data.order import Updates, padding_share
from mlx_fish.models.hub import find_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hub id or `tiny`; its tokenizer makes the rows")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4, 8])
    options = parser.parse_args()
    rows = fish_rows(find_model(options.model))
    print("| rows a batch | packing | updates | padding | shapes |\n|---|---|---|---|---|")
    for size, packing in itertools.product(options.batch_size, (True, False)):
        updates = Updates(rows, batch_size=size, accumulation=1, seed=DEFAULTS.seed, packing=packing)
        batches = [batch for step in range(updates.per_epoch) for batch in updates[step]]
        shapes = {shape_of(batch) for batch in batches}
        print(
            f"| {size} | {'yes' if packing else 'no'} | {updates.per_epoch} | {padding_share(updates, updates.per_epoch):.1%} | {len(shapes)} |"
        )


def shape_of(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """The sizes of all arrays that a step is given."""
    grid = batch.packing.grid.shape if batch.packing else ()
    return batch.inputs.shape, batch.targets.shape, grid


if __name__ == "__main__":
    main()
