"""How much of what is computed is padding, and how many shapes a compiled step meets, in an epoch of the fish data.

python scripts/batch_shapes.py --model DIR --batch-size 4
"""

import argparse

from bench_task import DEFAULTS, fish_rows

from mlx_fish.batches import Updates, padding_share
from mlx_fish.hub import find_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hub id or `tiny`; its tokenizer makes the rows")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4, 8])
    options = parser.parse_args()
    rows = fish_rows(find_model(options.model))
    print("| rows a batch | updates | padding | shapes |\n|---|---|---|---|")
    for size in options.batch_size:
        updates = Updates(rows, batch_size=size, accumulation=1, seed=DEFAULTS.seed)
        batches = [batch for step in range(updates.per_epoch) for batch in updates[step]]
        shapes = {
            (batch.inputs.shape, batch.packing.grid.shape if batch.packing else None, batch.targets.shape)
            for batch in batches
        }
        print(f"| {size} | {updates.per_epoch} | {padding_share(updates, updates.per_epoch):.1%} | {len(shapes)} |")


if __name__ == "__main__":
    main()
