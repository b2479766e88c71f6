"""What an update must compute and move for each input token, by part, and the time that a machine needs for that at the least.

    python benchmarks/print_roofline.py --model DIR --length 128 --batch-tokens 512 [--flops 2.8e12 --bandwidth 120e9 --bytes 2]

Counted from the model's shapes alone: nothing is measured here. A part takes the longer of its arithmetic and its traffic, one part
after the other. The default machine is the Mac mini M4 as measured elsewhere (2.8 TFLOP/s of matrix products, 120 GB/s).
"""

import argparse
from dataclasses import dataclass

from mlx_fish.adapters.spec import AdapterSpec, choose_layers
from mlx_fish.models.folder import ModelFolder
from mlx_fish.models.hub import find_model
from mlx_fish.planning.memory import Dimensions, Shape
from mlx_fish.planning.roofline import work_of


@dataclass(frozen=True)
class Part:
    """One part of an update, for one input token: floating-point operations, bytes moved, exponentials."""

    name: str
    flops: float
    bytes: float
    exps: float = 0.0

    def seconds(self, flops: float, bandwidth: float) -> float:
        """At a machine's operations and bytes a second."""
        return max(self.flops / flops, self.bytes / bandwidth)


TITLES = {
    "blocks": "matrix products of the blocks", "head": "head and loss, supervised rows only",
    "attention": "attention, the causal half", "lora": "LoRA's products",
    "elementwise": "norms, sums, positions, SwiGLU", "optimizer": "clipping and AdamW",
}  # fmt: skip


def parts_of(
    folder: ModelFolder, *, length: int, supervised: float, batch_tokens: int, rank: int, width: int
) -> list[Part]:
    """What `mlx-fish plan` counts (mlx_fish/roofline.py), for one input token of an update.

    Args:
        length: tokens of a row.
        supervised: the share of tokens that meet the head.
        batch_tokens: tokens of an update, which share each reading of the weights.
        width: bytes of a weight and of an activation.
    """
    model = Dimensions.of(folder, float_bytes=width if width == 4 else None)
    spec = AdapterSpec.uniform(choose_layers(folder.linear_layers), rank=rank, alpha=rank)
    labels = round(supervised * batch_tokens)
    work = work_of(model, spec, Shape(batch_tokens, batch_tokens // length, length, labels))
    head_size = model.queries // model.heads
    exponentials = {
        "head": model.vocab * labels / batch_tokens,
        "attention": model.num_blocks * model.queries / head_size * length / 2,
        "elementwise": 2 * model.num_blocks * model.inner,
    }
    return [
        Part(title, work[key].operations / batch_tokens, work[key].num_bytes / batch_tokens, exponentials.get(key, 0))
        for key, title in TITLES.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hub id or `tiny`")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--batch-tokens", type=int, default=512, help="tokens of an update")
    parser.add_argument("--supervised", type=float, default=0.57, help="share of the tokens that are learnt")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--bytes", type=int, choices=(2, 4), default=2, help="of a weight")
    parser.add_argument("--flops", type=float, default=2.8e12, help="matrix operations a second")
    parser.add_argument("--bandwidth", type=float, default=120e9, help="bytes a second")
    options = parser.parse_args()
    parts = parts_of(
        find_model(options.model),
        length=options.length,
        supervised=options.supervised,
        batch_tokens=options.batch_tokens,
        rank=options.rank,
        width=options.bytes,
    )
    print("| part | MFLOP a token | share | KB a token | exponentials a token | µs a token at least |")
    print("|---|---|---|---|---|---|")
    seconds = [part.seconds(options.flops, options.bandwidth) for part in parts]
    flops, moved, exps = (sum(getattr(part, name) for part in parts) for name in ("flops", "bytes", "exps"))
    for part, least in zip(parts, seconds, strict=True):
        counts = f"{part.flops / 1e6:,.1f} | {part.flops / flops:.1%} | {part.bytes / 1e3:,.0f} | {part.exps:,.0f}"
        print(f"| {part.name} | {counts} | {1e6 * least:,.1f} |")
    print(f"| all | {flops / 1e6:,.1f} | | {moved / 1e3:,.0f} | {exps:,.0f} | {1e6 * sum(seconds):,.0f} |")
    print(
        f"\nAt {options.flops / 1e12:g} TFLOP/s and {options.bandwidth / 1e9:g} GB/s: at most {1 / sum(seconds):,.0f} tokens/s."
    )


if __name__ == "__main__":
    main()
