"""Measure what training really holds, beside what `mlx-fish plan` says, and fit the few constants of mlx_fish/memory.py anew.

    python tools/fit_plan.py             # a table: measured and expected peaks
    python tools/fit_plan.py --fit       # also the constants that fit best
    python tools/fit_plan.py --held-out  # a table of models and settings that the constants were not fitted to

Random models of several shapes are trained for two updates by the MLX backend, those of each model in a process of its own. A peak is
MLX's own count (`mx.get_peak_memory`), which depends little on how busy the machine is.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from plan_settings import HELD_OUT, MODELS, QUANTIZED, SETTINGS, Setting

from mlx_fish.adapters.spec import initial_arrays
from mlx_fish.backends.protocol import optimizer_step
from mlx_fish.models.folder import ModelFolder
from mlx_fish.planning.memory import CONSTANTS, Constants, Dimensions, forward_peak_of, peak_of, shape_of
from mlx_fish.storage.tensors import write_shards


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes: the loaded model alone, and the peak of an update (the model included)."""

    setting: Setting
    weights: int
    peak: int


def make_folder(place: Path, name: str) -> ModelFolder:
    """A random model of MODELS, quantised to 4 bits when its name says so."""
    plain = name.removesuffix(QUANTIZED)
    folder = _write_model(place / plain, MODELS[plain])
    if name != plain:
        folder = _quantize(folder, place / name)
    return ModelFolder(folder, name)


def _write_model(folder: Path, shape: dict[str, Any]) -> Path:
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True)
    kind, hidden, inner = shape.get("type", "qwen2"), shape["hidden"], shape["inner"]
    narrow = hidden // shape["heads"] * shape["kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab"], hidden)}
    for block in range(shape["blocks"]):
        prefix = f"model.layers.{block}."
        for name, out, into in (
            ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", narrow, hidden),
            ("self_attn.v_proj", narrow, hidden), ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            shapes[f"{prefix}{name}.weight"] = (out, into)
            if kind == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{prefix}{name}.bias"] = (out,)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if kind == "llama":
        shapes["lm_head.weight"] = (shape["vocab"], hidden)
    rng = np.random.default_rng(0)
    write_shards(
        folder, shapes, lambda name: rng.standard_normal(shapes[name], np.float32) * 0.02, dtype="float32", shard_bytes=1 << 40
    )  # fmt: skip
    config = {
        "architectures": ["Qwen2ForCausalLM" if kind == "qwen2" else "LlamaForCausalLM"], "model_type": kind,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": shape["blocks"],
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"], "vocab_size": shape["vocab"],
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "tie_word_embeddings": kind == "qwen2", "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _quantize(source: Path, folder: Path) -> Path:
    from mlx_fish.backends.mlx.quantize import quantize_folder

    if not (folder / "config.json").is_file():
        folder.mkdir()
        config = json.loads((source / "config.json").read_text())
        found = quantize_folder(source, folder, config=config, bits=4, group_size=64, dtype="float32")
        (folder / "config.json").write_text(json.dumps(found))
    return folder


def measure(place: Path, settings: list[Setting]) -> Iterator[Measured]:
    """Two updates of each setting on one model, in this process."""
    import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
    import mlx.core as mx

    from mlx_fish.backends.mlx import MlxBackend

    folder = make_folder(place, settings[0].model)
    backend = MlxBackend(folder)
    weights = mx.get_active_memory()
    for setting in settings:
        spec = setting.spec(folder)
        backend.attach(spec, initial_arrays(spec, 0), grad_checkpoint=setting.grad_checkpoint)
        batch = setting.batch(folder.config["vocab_size"])
        for _ in range(2):
            backend.reset_peak_memory()
            if setting.training:
                assert optimizer_step(backend, [batch], 1e-4, [0])().updated
            else:
                backend.evaluate(batch)
        yield Measured(setting, weights, backend.peak_memory())


def measure_in_children(place: Path, settings: list[Setting]) -> Iterator[Measured]:
    """The settings of each model in a process of its own."""
    for model in dict.fromkeys(setting.model for setting in settings):
        own = [dataclasses.asdict(setting) for setting in settings if setting.model == model]
        command = [sys.executable, __file__, "--child", json.dumps(own), "--folder", str(place)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                yield Measured(Setting(**found["setting"]), found["weights"], found["peak"])
        if process.returncode:
            raise SystemExit(f"measuring {model} failed")


def expected(measured: Measured, place: Path, constants: Constants = CONSTANTS) -> int:
    """What memory.py says of the same update, in bytes."""
    return _expecting(measured, place)(constants)


def _expecting(measured: Measured, place: Path) -> Callable[[Constants], int]:
    folder, setting = make_folder(place, measured.setting.model), measured.setting
    model, spec = Dimensions.of(folder, float_bytes=4), setting.spec(folder)
    shape = shape_of(setting.micro_batch(model.vocab), packing=setting.packing)
    if not setting.training:
        return lambda constants: forward_peak_of(model, spec, shape, constants=constants).total
    return lambda constants: (
        peak_of(model, spec, shape, grad_checkpoint=setting.grad_checkpoint, constants=constants).total
    )


def fit(measured: list[Measured], place: Path) -> Constants:
    """The constants with the least sum of relative errors' fourth powers, by a descent along one of them at a time.

    Fourth powers, since what is promised is the largest error.
    """
    expecting = [(_expecting(found, place), found.peak) for found in measured]

    def error(constants: Constants) -> float:
        return sum((expect(constants) / peak - 1) ** 4 for expect, peak in expecting)

    best, step = CONSTANTS, 0.25
    while step > 0.005:
        before = best
        for item in dataclasses.fields(Constants):
            for change in (step, -step):
                value = max(0.0, getattr(best, item.name) + change * max(1.0, getattr(best, item.name)))
                trial = dataclasses.replace(best, **{item.name: value})
                best = min(best, trial, key=error)
        if best == before:
            step /= 2
    return best


def table(measured: list[Measured], place: Path, constants: Constants) -> str:
    """Markdown: each setting, its peak measured and expected, and by how much the two differ, also without the weights."""
    lines = [
        "| model | rows x tokens | layout | labels | rank | layers | checkpointing | weights | measured | expected | error | above weights |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in measured:
        setting, said = found.setting, expected(found, place, constants)
        layers = setting.target if setting.num_layers is None else f"last {setting.num_layers} blocks"
        checkpointing = ("on" if setting.grad_checkpoint else "off") if setting.training else "validation"
        dropout = f", dropout {setting.dropout}" if setting.dropout else ""
        lines.append(
            f"| {setting.model} | {setting.batch_size} x {setting.length} | {'packed' if setting.packing else 'padded'} | {setting.labels:.0%} | {setting.rank} | {layers}{dropout} | "
            f"{checkpointing} | {found.weights / 1e6:.0f} MB | {found.peak / 1e6:.0f} MB | {said / 1e6:.0f} MB | "
            f"{said / found.peak - 1:+.1%} | {(said - found.weights) / (found.peak - found.weights) - 1:+.1%} |"
        )
    worst = max(abs(expected(found, place, constants) / found.peak - 1) for found in measured)
    return "\n".join([*lines, "", f"{len(measured)} settings, the largest error {worst:.1%}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="find the constants anew, and show the table with them")
    parser.add_argument("--held-out", action="store_true", help="measure the settings that nothing was fitted to")
    parser.add_argument("--json", type=Path, help="keep the measurements here; those in it already are not made again")
    parser.add_argument("--folder", type=Path, help="keep the random models here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        for found in measure(options.folder, [Setting(**values) for values in json.loads(options.child)]):
            print(json.dumps(dataclasses.asdict(found)), flush=True)
        return
    if options.fit and options.held_out:
        parser.error("--fit and --held-out exclude each other.")
    settings = HELD_OUT if options.held_out else SETTINGS
    known = json.loads(options.json.read_text()) if options.json and options.json.is_file() else []
    measured = [Measured(Setting(**found["setting"]), found["weights"], found["peak"]) for found in known]
    measured = [found for found in measured if found.setting in settings]
    with tempfile.TemporaryDirectory() as temporary:
        place = options.folder or Path(temporary)
        missing = [setting for setting in settings if setting not in [found.setting for found in measured]]
        for found in measure_in_children(place, missing):
            print(f"{found.setting}: {found.peak / 1e6:.0f} MB", file=sys.stderr)
            measured.append(found)
            if options.json:
                options.json.write_text(json.dumps([dataclasses.asdict(each) for each in measured], indent=1))
        constants = fit(measured, place) if options.fit else CONSTANTS
        print(table(measured, place, constants))
        if options.fit:
            print("\n" + "\n".join(f"{name}={value:.2f}" for name, value in dataclasses.asdict(constants).items()))


if __name__ == "__main__":
    main()
