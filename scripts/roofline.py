"""What an update must compute and move for each input token, by part, and the time that a machine needs for that at the least.

    python scripts/roofline.py --model DIR --length 128 --batch-tokens 512 [--flops 2.8e12 --bandwidth 120e9 --bytes 2]

Counted from the model's shapes alone: nothing is measured here. A part takes the longer of its arithmetic and its traffic, one part
after the other. The default machine is the Mac mini M4 as measured elsewhere (2.8 TFLOP/s of matrix products, 120 GB/s).
"""

import argparse
from dataclasses import dataclass
from typing import Any

from mlx_fish.adapter import LoraSpec, choose_layers
from mlx_fish.hub import find_model
from mlx_fish.model_folder import ModelFolder


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


def parts_of(
    folder: ModelFolder, *, length: int, supervised: float, batch_tokens: int, rank: int, width: int
) -> list[Part]:
    """The parts of forward, backward and AdamW under LoRA: the frozen weights get no gradient, so a product costs 4 operations a
    weight (2 forward, 2 for the gradient of its input), not 6.

    Args:
        length: tokens of a row; a token attends to half of them on average.
        supervised: the share of tokens that meet the head.
        batch_tokens: tokens of an update, which share each reading of the weights.
        width: bytes of a weight and of an activation.
    """
    config: dict[str, Any] = folder.config
    layers = choose_layers(folder.linear_layers)
    hidden, blocks, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // heads
    keys = config["num_key_value_heads"] * head_size
    weights = sum(out * inner for out, inner in layers.values())
    ends = sum(out + inner for out, inner in layers.values())
    adapter = LoraSpec.uniform(layers, rank=rank, alpha=rank).num_parameters
    attention = heads * head_size * length * blocks
    wide = blocks * config["intermediate_size"]
    # Norms, residual sums, rotary positions and SwiGLU, each read and written once forward and once backward.
    elements = blocks * (26 * hidden + 4 * keys) + 8 * wide
    return [
        Part("matrix products of the blocks", 4 * weights, 2 * width * (weights / batch_tokens + ends)),
        Part("head and loss, supervised rows only", 4 * vocabulary * hidden * supervised, 2 * width * vocabulary * hidden / batch_tokens, vocabulary * supervised),
        Part("attention, the causal half", 6 * attention, 8 * width * blocks * (2 * hidden + 2 * keys), attention / (2 * head_size)),
        Part("LoRA's products", 6 * adapter, 3 * width * (ends + rank * len(layers))),
        Part("norms, sums, positions, SwiGLU", 4 * elements, width * elements, 2 * wide),
        Part("clipping and AdamW", 16 * adapter / batch_tokens, 4 * 8 * adapter / batch_tokens),
    ]  # fmt: skip


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
