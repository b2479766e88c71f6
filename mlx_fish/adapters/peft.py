"""The PEFT LoRA adapter on disk: `adapter_model.safetensors` in float32 beside `adapter_config.json`.

The format is PEFT's: `base_model.model.<module>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r). Adapters of other
trainers are read through `formats.py`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_fish.adapters.formats import (
    CONFIG_FILE,
    MLX_LM_FILE,
    check_peft,
    is_mlx_lm,
    peft_dropout,
    peft_scale,
    read_mlx_lm,
)
from mlx_fish.adapters.spec import AdapterSpec, Arrays, LayerSpec, block_of, scale_of, tensor_key
from mlx_fish.errors import FishError
from mlx_fish.storage.files import read_json, write_json
from mlx_fish.storage.tensors import Float32, Weights, read_header, write_safetensors

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter read from disk. `arrays` has PEFT's keys; `config` is adapter_config.json, in PEFT's terms.

    `magnitudes` holds DoRA's length of each row by module path, (out,); empty for plain LoRA.
    """

    path: Path
    spec: AdapterSpec
    arrays: Arrays
    config: dict[str, Any] = field(default_factory=dict)
    magnitudes: Arrays = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        return self.config.get("base_model_name_or_path")

    def factors(self, module: str) -> tuple[Float32, Float32]:
        """A (r, in) and B (out, r) of an adapted layer."""
        a, b = (self.arrays[tensor_key(module, name)] for name in self.spec.layers[module].tensors)
        return a, b


def save_adapter(folder: Path, arrays: Arrays, config: dict[str, Any]) -> None:
    """Write the PEFT pair, each file whole or not at all. Weights that are not finite are refused (`write_safetensors`)."""
    write_json(folder / CONFIG_FILE, config)
    write_safetensors(folder / WEIGHTS_FILE, arrays, {"format": "pt"})


def peft_config(
    spec: AdapterSpec, *, rank: int, alpha: float, num_blocks: int, base: str, revision: str | None
) -> dict[str, Any]:
    """adapter_config.json as PEFT 0.21 reads it.

    `layers_to_transform` is written only when some blocks are left out, since not every reader knows it. The scale of rsLoRA
    is folded into alpha: a reader that does not know `use_rslora`, such as llama.cpp's converter, would compute another one.
    """
    if spec.kind == "rslora":
        alpha = scale_of(spec.kind, rank=rank, alpha=alpha) * rank
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


def _spec_of(path: Path, config: dict[str, Any], arrays: Arrays) -> AdapterSpec:
    """Layers, ranks and scales, from the tensors themselves."""
    layers: dict[str, LayerSpec] = {}
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
        b = arrays.get(tensor_key(module, "lora_B"))
        if b is None or array.ndim != 2 or b.ndim != 2 or b.shape[1] != array.shape[0]:
            raise FishError(f"{path}: A and B of {module} do not fit each other.")
        rank = array.shape[0]
        layers[module] = LayerSpec((b.shape[0], array.shape[1]), rank, peft_scale(config, module, rank))
    if 2 * len(layers) != len(arrays):
        raise FishError(f"{path} has a lora_B without its lora_A; the file is incomplete.")
    if not layers:
        raise FishError(f"{path} holds no LoRA tensors.")
    order = sorted(layers, key=lambda module: (block_of(module), module))
    kind = "rslora" if config.get("use_rslora") else "lora"
    return AdapterSpec(kind, {module: layers[module] for module in order}, peft_dropout(config))


def check_plain(adapter: Adapter, what: str) -> None:
    """Refuse DoRA where only plain LoRA can be computed."""
    if adapter.magnitudes:
        raise FishError(
            f"the adapter {adapter.path} is DoRA, which {what} does not compute; fuse it with `mlx-fish fuse --to-hf` first."
        )


def check_fits(adapter: Adapter, linear_layers: dict[str, tuple[int, int]], model: str) -> None:
    """Every adapted layer exists in the model, in the adapter's shape."""
    for module, layer in adapter.spec.layers.items():
        if linear_layers.get(module) != layer.shape:
            found = linear_layers.get(module)
            has = f"has shape {found} there" if found else "does not exist there"
            raise FishError(
                f"the adapter {adapter.path} (trained on {adapter.base}) does not fit the model {model}: "
                f"{module} needs shape {layer.shape} and {has}."
            )
