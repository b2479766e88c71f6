"""Where an update's time goes: each part of a step alone, forward and backward, beside the whole compiled step.

    python benchmarks/profile_step.py --model DIR --length 128 --batch-size 4 --rounds 5 [--json profile.json]

The parts are computed on arrays of the step's shapes and multiplied by how often the model has them; the whole step is measured in
turn with them. A part alone may keep in the cache what it would find elsewhere in a step, and a compiled step joins elementwise
operations, so the sum of the parts and the whole differ; the table says by how much.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_length import attention_alone
from bench_task import DEFAULTS, SUPERVISED_SHARE, synthetic_rows
from print_roofline import parts_of

from mlx_fish.adapters.spec import AdapterSpec, choose_layers, initial_arrays
from mlx_fish.backends.choose import choose_backend, load_backend
from mlx_fish.backends.protocol import optimizer_step
from mlx_fish.data.order import Updates
from mlx_fish.models.hub import find_model


@dataclass(frozen=True)
class Timed:
    """A part of a step: how often the step has it, its calls, and the roofline's name for it where it is the whole of that part."""

    name: str
    times: int
    run: Callable[[], Any]
    counted_as: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hub id or `tiny`")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write every time here")
    options = parser.parse_args()
    choose_backend("mlx")  # before transformers is imported
    parts, flops = parts_of_step(options)
    times = in_turn(parts, options.rounds)
    print(table(parts, times, flops))
    if options.json:
        record = {"settings": {**vars(options), "json": None}, "seconds": times}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def parts_of_step(options: argparse.Namespace) -> tuple[list[Timed], dict[str, float]]:
    """The parts, the whole step last; and the operations that the roofline counts for each of its parts in one update."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_fish.backends.mlx.activations import swiglu
    from mlx_fish.backends.mlx.loss import Head, make_log_probs
    from mlx_fish.backends.mlx.model import load_model
    from mlx_fish.backends.mlx.step import Step

    folder = find_model(options.model)
    config = folder.config
    blocks, width, wide = (config[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    tokens = options.batch_size * options.length
    labels = round(SUPERVISED_SHARE * tokens)
    model, dtype = load_model(folder, lambda text: None)  # plain layers: the step's own model carries LoRA
    head = Head.of(model)
    step, spec = whole_step(folder, options)

    def random(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype)

    def both_ways(compute: Callable[..., Any], *inputs: mx.array) -> Callable[[], Any]:
        """The value and the gradients of all inputs, compiled as in a step."""
        cotangent = mx.ones_like(compute(*inputs))
        mx.eval(inputs, cotangent)
        compiled = mx.compile(lambda *arrays: mx.vjp(compute, arrays[:-1], [arrays[-1]]))
        return lambda: mx.eval(compiled(*inputs, cotangent))

    weights = {name: weight_of(model, name) for name in choose_layers(folder.linear_layers) if ".layers.0." in name}

    def products() -> Any:
        found = []
        for name, weight in weights.items():
            low, high = ins[name], outs[name]
            found += [low @ weight.T, high @ weight]
        mx.eval(found)

    ins = {name: random(tokens, weight.shape[1]) for name, weight in weights.items()}
    outs = {name: random(tokens, weight.shape[0]) for name, weight in weights.items()}
    mx.eval(ins, outs)
    norm = nn.RMSNorm(width, eps=1e-6)
    size = config.get("head_dim") or width // config["num_attention_heads"]
    rope = nn.RoPE(size, base=config["rope_theta"])
    rotated = [
        random(options.batch_size, config[heads], options.length, size)
        for heads in ("num_attention_heads", "num_key_value_heads")
    ]
    log_probs = make_log_probs(head)
    targets = mx.random.randint(0, head.vocab_size, (labels,), key=mx.random.key(0))
    adapter = [mx.zeros((spec.num_parameters,)) for _ in range(4)]
    rate, number = mx.array(1e-4), mx.array(1.0)
    update = mx.compile(Step._clip_and_update)
    attend = attention_alone(folder, options.batch_size, options.length, str(dtype).removeprefix("mlx.core."))

    def low_rank(x: mx.array, y: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return mx.addmm(y, x @ a.T, b.T, alpha=2.0)

    lora = [
        both_ways(low_rank, ins[name], outs[name], random(options.rank, shape[1]), random(shape[0], options.rank))
        for name, shape in ((name, weight.shape) for name, weight in weights.items())
    ]
    parts = [
        Timed("matrix products of the blocks", blocks, products, "matrix products of the blocks"),
        Timed("head and loss, supervised rows only", 1, both_ways(lambda h: -log_probs(h, targets), random(labels, width)), "head and loss, supervised rows only"),
        Timed("attention", blocks, attend, "attention, the causal half"),
        Timed("LoRA's products and its sum with W x", blocks, lambda: [run() for run in lora], "LoRA's products"),
        Timed("SwiGLU", blocks, both_ways(swiglu, random(tokens, wide), random(tokens, wide))),
        Timed("norms", 2 * blocks + 1, both_ways(norm, random(tokens, width))),
        Timed("rotary positions", blocks, both_ways(lambda q, k: rope(q).sum() + rope(k).sum(), *rotated)),
        Timed("residual sums", 2 * blocks, both_ways(lambda x, y: x + y, random(tokens, width), random(tokens, width))),
        Timed("clipping and AdamW", 1, lambda: mx.eval(update(*adapter[:3], rate, number, rate, adapter[3]))),
        Timed("whole step", 1, step),
    ]  # fmt: skip
    counted = parts_of(
        folder, length=options.length, supervised=SUPERVISED_SHARE, batch_tokens=tokens, rank=options.rank, width=4
    )
    return parts, {part.name: tokens * part.flops for part in counted}


def whole_step(folder: Any, options: argparse.Namespace) -> tuple[Callable[[], Any], AdapterSpec]:
    backend = load_backend(folder, name="mlx")
    spec = AdapterSpec.uniform(choose_layers(folder.linear_layers), rank=options.rank, alpha=2 * options.rank)
    backend.attach(spec, initial_arrays(spec, DEFAULTS.seed))
    rows = synthetic_rows(folder, options.batch_size, options.length)
    batches = Updates(rows, batch_size=options.batch_size, accumulation=1, seed=DEFAULTS.seed)[0]
    return lambda: optimizer_step(backend, batches, DEFAULTS.learning_rate, [0])(), spec


def weight_of(model: Any, module: str) -> Any:
    """(out, in), expanded when the model is quantised."""
    import mlx.core as mx

    layer = model
    for part in module.split("."):
        layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
    if "scales" not in layer:
        return layer.weight
    return mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits)


def in_turn(parts: list[Timed], rounds: int) -> dict[str, float]:
    """Median seconds of a part in one step; the first run of each compiles, and is not timed."""
    found: dict[str, list[float]] = {part.name: [] for part in parts}
    for number in range(rounds + 1):
        for part in parts:
            started = time.perf_counter()
            part.run()
            if number:
                found[part.name].append(part.times * (time.perf_counter() - started))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def table(parts: list[Timed], times: dict[str, float], flops: dict[str, float]) -> str:
    """Markdown: seconds, share of the whole step, and operations a second where the roofline counts them."""
    whole = times["whole step"]
    lines = ["| part | times | ms | share of the step | GFLOP/s |", "|---|---|---|---|---|"]
    for part in parts:
        seconds = times[part.name]
        rate = f"{flops[part.counted_as] / seconds / 1e9:.0f}" if part.counted_as else ""
        lines.append(f"| {part.name} | {part.times} | {1e3 * seconds:.1f} | {seconds / whole:.1%} | {rate} |")
    known = sum(seconds for name, seconds in times.items() if name != "whole step")
    lines.append(f"| sum of the parts | | {1e3 * known:.1f} | {known / whole:.1%} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
