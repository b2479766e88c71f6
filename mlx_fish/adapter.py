"""The PEFT LoRA adapter: which layers it sits on, how it starts, and how it lies on disk.

LoRA: arXiv 2106.09685. y = W x + scale * B (A x), with A (r, in) and B (out, r). The file format is PEFT's:
`base_model.model.<module>.lora_A.weight` and `.lora_B.weight` in float32, beside `adapter_config.json`.
"""

import math
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fish.adapter_formats import (
    CONFIG_FILE,
    MLX_LM_FILE,
    check_peft,
    is_mlx_lm,
    peft_dropout,
    peft_scale,
    read_mlx_lm,
)
from mlx_fish.errors import FishError, did_you_mean
from mlx_fish.files import read_json, write_json
from mlx_fish.tensors import Float32, Weights, read_header, write_safetensors

WEIGHTS_FILE = "adapter_model.safetensors"
RUN_FILE = "run.json"
_PREFIX = "base_model.model."
_DELTA_ROWS = 64  # so that a block of rows stays in the cache

Arrays = dict[str, Float32]


@dataclass(frozen=True)
class LoraSpec:
    """The shape of an adapter.

    Attributes:
        layers: module path -> (out, in), the layers adapted, in model order.
        ranks: module path -> r.
        scales: module path -> the factor on B A (alpha / r).
        dropout: the share of LoRA's input that is zeroed in training.
    """

    layers: dict[str, tuple[int, int]]
    ranks: dict[str, int]
    scales: dict[str, float]
    dropout: float = 0.0

    @classmethod
    def uniform(
        cls, layers: dict[str, tuple[int, int]], *, rank: int, alpha: float, dropout: float = 0.0
    ) -> "LoraSpec":
        return cls(layers, dict.fromkeys(layers, rank), dict.fromkeys(layers, alpha / rank), dropout)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """PEFT's key -> shape, of every tensor."""
        found: dict[str, tuple[int, ...]] = {}
        for module, (out, inner) in self.layers.items():
            found[key_a(module)] = (self.ranks[module], inner)
            found[key_b(module)] = (out, self.ranks[module])
        return found

    @property
    def num_parameters(self) -> int:
        return sum(self.ranks[name] * (out + inner) for name, (out, inner) in self.layers.items())


@dataclass(frozen=True)
class Adapter:
    """An adapter read from disk. `arrays` has PEFT's keys; `config` is adapter_config.json, in PEFT's terms.

    `magnitudes` holds DoRA's length of each row by module path, (out,); empty for plain LoRA.
    """

    path: Path
    spec: LoraSpec
    arrays: Arrays
    config: dict[str, Any] = field(default_factory=dict)
    magnitudes: Arrays = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        return self.config.get("base_model_name_or_path")


def key_a(module: str) -> str:
    return f"{_PREFIX}{module}.lora_A.weight"


def key_b(module: str) -> str:
    return f"{_PREFIX}{module}.lora_B.weight"


def choose_layers(
    linear_layers: dict[str, tuple[int, int]], *, target: str = "all", num_layers: int | None = None
) -> dict[str, tuple[int, int]]:
    """The layers to adapt.

    Args:
        linear_layers: every linear layer of every block, in any order (`ModelFolder.linear_layers`).
        target: `all`, or names such as `q_proj,v_proj`.
        num_layers: adapt only the last so many blocks.
    """
    known = sorted({module.rsplit(".", 1)[-1] for module in linear_layers})
    wanted = [name.strip() for name in target.split(",") if name.strip()]
    for name in wanted:
        if name not in (*known, "all"):
            hint = did_you_mean(name, [*known, "all"])
            raise FishError(f"--lora-target {name}: the model's linear layers are {', '.join(known)}, or all.{hint}")
    if not wanted:
        raise FishError(f"--lora-target is empty; name some of {', '.join(known)}, or all.")
    num_blocks = 1 + max(block_of(module) for module in linear_layers)
    if num_layers is not None and not 1 <= num_layers <= num_blocks:
        raise FishError(f"--num-layers {num_layers}: the model has {num_blocks} layers; give 1 to {num_blocks}.")
    first = num_blocks - num_layers if num_layers else 0
    # A file may hold its tensors in any order. MLX computes gradients in the order of the layers, and out of the model's order keeps
    # what checkpointing computed again: 1.43 GB above the weights instead of 0.42 GB for Qwen2-0.5B, 4 rows of 144 tokens.
    return {
        module: shape
        for module, shape in sorted(linear_layers.items(), key=lambda item: block_of(item[0]))
        if block_of(module) >= first and ("all" in wanted or module.rsplit(".", 1)[-1] in wanted)
    }


def block_of(module: str) -> int:
    """`model.layers.7.mlp.up_proj` -> 7."""
    return int(module.split(".layers.", 1)[1].split(".", 1)[0])


def initial_arrays(spec: LoraSpec, seed: int) -> Arrays:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), as MLX and PEFT both draw it, and B = 0: step 0 computes the base model.

    Each layer draws from a generator of its own, keyed by (seed, name), so that a start does not depend on
    which other layers are adapted, nor on the backend.
    """
    arrays: Arrays = {}
    for module, (out, inner) in spec.layers.items():
        generator = np.random.default_rng([seed, zlib.crc32(module.encode())])
        bound = 1.0 / math.sqrt(inner)
        arrays[key_a(module)] = generator.uniform(-bound, bound, (spec.ranks[module], inner)).astype(np.float32)
        arrays[key_b(module)] = np.zeros((out, spec.ranks[module]), np.float32)
    return arrays


def delta(adapter: Adapter, module: str) -> Float32:
    """scale * B A, (out, in), float32: what merging adds to the layer's weight.

    Summed rank by rank, since a matrix product's last bits depend on the CPU (OpenBLAS has a kernel for each), and
    a merge should give the same bytes on every machine.
    """
    a, b = adapter.arrays[key_a(module)], adapter.arrays[key_b(module)]
    product = np.zeros((b.shape[0], a.shape[1]), np.float32)
    term = np.empty((_DELTA_ROWS, a.shape[1]), np.float32)
    for start in range(0, b.shape[0], _DELTA_ROWS):
        rows = b[start : start + _DELTA_ROWS]
        for k in range(a.shape[0]):
            np.multiply(rows[:, k : k + 1], a[k], out=term[: len(rows)])
            product[start : start + len(rows)] += term[: len(rows)]
    product *= np.float32(adapter.spec.scales[module])
    return product


def save_adapter(folder: Path, arrays: Arrays, config: dict[str, Any]) -> None:
    """Write the PEFT pair, each file whole or not at all. Weights that are not finite are refused (`write_safetensors`)."""
    write_json(folder / CONFIG_FILE, config)
    write_safetensors(folder / WEIGHTS_FILE, arrays, {"format": "pt"})


def peft_config(
    spec: LoraSpec, *, rank: int, alpha: float, num_blocks: int, base: str, revision: str | None
) -> dict[str, Any]:
    """adapter_config.json as PEFT 0.21 reads it.

    `layers_to_transform` is written only when some blocks are left out, since not every reader knows it.
    """
    blocks = sorted({block_of(module) for module in spec.layers})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,  # Ollama reads an unsigned integer
        "lora_dropout": spec.dropout,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in spec.layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    if len(blocks) < num_blocks:
        config["layers_to_transform"] = blocks
        config["layers_pattern"] = "layers"
    return config


def is_adapter(folder: Path) -> bool:
    """Holds an adapter, in PEFT's layout or mlx-lm's."""
    has_config = (folder / CONFIG_FILE).is_file()
    return has_config and ((folder / WEIGHTS_FILE).is_file() or is_mlx_lm(folder))


def load_adapter(folder: Path) -> Adapter:
    """Read a LoRA or DoRA adapter: ours, PEFT's (LLaMA-Factory, Unsloth), or mlx-lm's.

    Raises:
        FishError: not an adapter folder, or one that asks for what mlx-fish does not compute (named).
    """
    if not is_adapter(folder):
        raise FishError(
            f"{folder} is not a trained adapter: {CONFIG_FILE} and {WEIGHTS_FILE} were expected; "
            "run `mlx-fish train` first, or name another folder with --adapter."
        )
    if (folder / WEIGHTS_FILE).is_file():
        path, config = folder / WEIGHTS_FILE, read_json(folder / CONFIG_FILE)
        check_peft(folder, config)
        weights = Weights(read_header(path)[0])
        found = {name: weights.read(name) for name in weights}
    else:
        path = folder / MLX_LM_FILE
        config, found = read_mlx_lm(folder)
    arrays, magnitudes = _split_magnitudes(found)
    spec = _spec_of(path, config, arrays)
    if set(magnitudes) != (set(spec.layers) if config.get("use_dora") else set()):
        raise FishError(f"{path}: use_dora and the magnitude vectors do not fit each other; the file is incomplete.")
    return Adapter(folder, spec, arrays, config, magnitudes)


def _split_magnitudes(found: Arrays) -> tuple[Arrays, Arrays]:
    """(A and B under PEFT's keys, DoRA's lengths by module path)."""
    lengths = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_magnitude_vector(\.weight)?")
    matches = {name: lengths.fullmatch(name) for name in found}
    arrays = {name: found[name] for name, match in matches.items() if match is None}
    return arrays, {match[1]: found[name].reshape(-1) for name, match in matches.items() if match is not None}


def _spec_of(path: Path, config: dict[str, Any], arrays: Arrays) -> LoraSpec:
    """Layers, ranks and scales, from the tensors themselves."""
    layers: dict[str, tuple[int, int]] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for name, array in arrays.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(model\.layers\.\d+\.[\w.]+)\.lora_([AB])\.weight", name)
        if match is None:
            raise FishError(
                f"{path} holds {name}, which is not LoRA on a layer of a block; adapters on embeddings or the head are "
                "read differently by every program, and are not taken."
            )
        if match[2] == "B":
            continue
        module = match[1]
        b = arrays.get(key_b(module))
        if b is None or array.ndim != 2 or b.ndim != 2 or b.shape[1] != array.shape[0]:
            raise FishError(f"{path}: A and B of {module} do not fit each other.")
        layers[module] = (b.shape[0], array.shape[1])
        ranks[module] = array.shape[0]
        scales[module] = peft_scale(config, module, array.shape[0])
    if 2 * len(layers) != len(arrays):
        raise FishError(f"{path} has a lora_B without its lora_A; the file is incomplete.")
    if not layers:
        raise FishError(f"{path} holds no LoRA tensors.")
    order = sorted(layers, key=lambda module: (block_of(module), module))
    return LoraSpec({module: layers[module] for module in order}, ranks, scales, peft_dropout(config))


def check_plain(adapter: Adapter, what: str) -> None:
    """Refuse DoRA where only plain LoRA can be computed."""
    if adapter.magnitudes:
        raise FishError(
            f"the adapter {adapter.path} is DoRA, which {what} does not compute; fuse it with `mlx-fish fuse --to-hf` first."
        )


def check_fits(adapter: Adapter, linear_layers: dict[str, tuple[int, int]], model: str) -> None:
    """Every adapted layer exists in the model, in the adapter's shape."""
    for module, shape in adapter.spec.layers.items():
        if linear_layers.get(module) != shape:
            found = linear_layers.get(module)
            has = f"has shape {found} there" if found else "does not exist there"
            raise FishError(
                f"the adapter {adapter.path} (trained on {adapter.base}) does not fit the model {model}: "
                f"{module} needs shape {shape} and {has}."
            )


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of an adapter that `mlx-fish train` wrote; empty beside another trainer's."""
    path = folder / RUN_FILE
    return read_json(path) if path.is_file() else {}


def check_base(adapter: Adapter, fingerprint: str, model: str) -> None:
    """The model is the one that the adapter was trained on, as far as its run.json tells.

    Args:
        fingerprint: `ModelFolder.fingerprint` of the model.
        model: the model's name, for the message.
    """
    trained_on = read_run(adapter.path).get("base")
    if not isinstance(trained_on, dict) or trained_on.get("fingerprint") in (None, fingerprint):
        return
    raise FishError(
        f"the adapter {adapter.path} was trained on {trained_on.get('name', adapter.base)}, and the weights of {model} "
        "are not the same; give the model that it was trained on with --model."
    )
