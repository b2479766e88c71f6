"""Read and write adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

The tensors are `base_model.model.<module>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r), float32. Adapters of
other trainers are read with the functions of `formats.py`.
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
    """An adapter in memory.

    Attributes:
        path: the adapter's folder.
        spec: the adapted layers, their ranks and scales.
        arrays: A and B of every layer under PEFT's keys, float32.
        config: adapter_config.json, converted to PEFT's fields if another trainer wrote it.
        magnitudes: module path -> DoRA's magnitude of each row, (out,); empty for plain LoRA.
    """

    path: Path
    spec: AdapterSpec
    arrays: Arrays
    config: dict[str, Any] = field(default_factory=dict)
    magnitudes: Arrays = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """Return the name of the base model in the config; None if it has none."""
        return self.config.get("base_model_name_or_path")

    def factors(self, module: str) -> tuple[Float32, Float32]:
        """Return A (r, in) and B (out, r) of an adapted layer."""
        a, b = (self.arrays[tensor_key(module, name)] for name in self.spec.layers[module].tensors)
        return a, b


def save_adapter(folder: Path, arrays: Arrays, config: dict[str, Any]) -> None:
    """Write the config and the weights in PEFT's format. Each write is atomic.

    Args:
        folder: where to write.
        arrays: A and B of every layer under PEFT's keys, float32.
        config: content of adapter_config.json.

    Raises:
        FishError: a weight is not finite.
    """
    write_json(folder / CONFIG_FILE, config)
    write_safetensors(folder / WEIGHTS_FILE, arrays, {"format": "pt"})


def peft_config(
    spec: AdapterSpec, *, rank: int, alpha: float, num_blocks: int, base: str, revision: str | None
) -> dict[str, Any]:
    """Return the content of adapter_config.json, as PEFT 0.21 reads it.

    `layers_to_transform` is included only if some blocks are not adapted, since not every reader supports it. rsLoRA's
    scale is folded into alpha: a reader without support for `use_rslora`, such as llama.cpp's converter, would compute
    a different scale.

    Args:
        spec: the adapted layers and the dropout.
        rank: r.
        alpha: alpha before the rsLoRA conversion.
        num_blocks: number of the base's transformer blocks.
        base: name of the base model, a Hub id or a path.
        revision: the base's revision on the Hub; None if unknown.
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
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,  # Ollama expects an unsigned integer
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
    """Return whether a folder has an adapter in PEFT's layout or mlx-lm's."""
    has_config = (folder / CONFIG_FILE).is_file()
    return has_config and ((folder / WEIGHTS_FILE).is_file() or is_mlx_lm(folder))


def load_adapter(folder: Path) -> Adapter:
    """Read a LoRA or DoRA adapter of mlx-fish, PEFT (LLaMA-Factory, Unsloth) or mlx-lm.

    Raises:
        FishError: the folder has no adapter, the adapter is damaged, or it uses features that mlx-fish does not
            support.
    """
    if not is_adapter(folder):
        raise FishError(
            f"{folder} has no trained adapter ({CONFIG_FILE} and {WEIGHTS_FILE}); "
            "run `mlx-fish train` first, or choose another folder with --adapter."
        )
    if (folder / WEIGHTS_FILE).is_file():
        path, config = folder / WEIGHTS_FILE, read_json(folder / CONFIG_FILE)
        check_peft(folder, config)
        weights = Weights(read_header(path)[0])
        tensors = {name: weights.read(name) for name in weights}
    else:
        path = folder / MLX_LM_FILE
        config, tensors = read_mlx_lm(folder)
    arrays, magnitudes = _split_magnitudes(tensors)
    spec = _spec_of(path, config, arrays)
    if set(magnitudes) != (set(spec.layers) if config.get("use_dora") else set()):
        raise FishError(
            f"{path}: use_dora in {CONFIG_FILE} and the magnitude vectors do not match; the adapter is incomplete, "
            "save it again."
        )
    return Adapter(folder, spec, arrays, config, magnitudes)


def _split_magnitudes(tensors: Arrays) -> tuple[Arrays, Arrays]:
    """Split an adapter's tensors into A and B under PEFT's keys, and DoRA's magnitudes (out,) by module path."""
    pattern = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_magnitude_vector(\.weight)?")
    matches = {name: pattern.fullmatch(name) for name in tensors}
    arrays = {name: tensors[name] for name, match in matches.items() if match is None}
    return arrays, {match[1]: tensors[name].reshape(-1) for name, match in matches.items() if match is not None}


def _spec_of(path: Path, config: dict[str, Any], arrays: Arrays) -> AdapterSpec:
    """Determine layers and ranks from the tensors' names and shapes, and scales from the config."""
    layers: dict[str, LayerSpec] = {}
    for name, array in arrays.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(model\.layers\.\d+\.[\w.]+)\.lora_([AB])\.weight", name)
        if match is None:
            raise FishError(
                f"{path} has the tensor {name}, which is not LoRA on a layer of a transformer block; adapters on "
                "embeddings or the head are not supported, since every program reads them differently."
            )
        if match[2] == "B":
            continue
        module = match[1]
        b = arrays.get(tensor_key(module, "lora_B"))
        if b is None or array.ndim != 2 or b.ndim != 2 or b.shape[1] != array.shape[0]:
            raise FishError(f"{path}: the shapes of A and B of {module} do not match; the file is damaged.")
        rank = array.shape[0]
        layers[module] = LayerSpec((b.shape[0], array.shape[1]), rank, peft_scale(config, module, rank))
    if 2 * len(layers) != len(arrays):
        raise FishError(f"{path} has a lora_B without its lora_A; the file is incomplete.")
    if not layers:
        raise FishError(f"{path} has no LoRA tensors.")
    order = sorted(layers, key=lambda module: (block_of(module), module))
    kind = "rslora" if config.get("use_rslora") else "lora"
    return AdapterSpec(kind, {module: layers[module] for module in order}, peft_dropout(config))


def check_plain(adapter: Adapter, what: str) -> None:
    """Check that an adapter is plain LoRA, not DoRA.

    Args:
        adapter: the adapter.
        what: the feature or format that supports only plain LoRA, for the error message.

    Raises:
        FishError: the adapter is DoRA.
    """
    if adapter.magnitudes:
        raise FishError(
            f"the adapter {adapter.path} is DoRA, but {what} supports only plain LoRA; "
            "fuse it with `mlx-fish fuse --to-hf` first."
        )


def check_fits(adapter: Adapter, linear_layers: dict[str, tuple[int, int]], model: str) -> None:
    """Check that the model has every adapted layer, in the adapter's shape.

    Args:
        adapter: the adapter.
        linear_layers: module path -> (out, in) of the model's linear layers.
        model: name of the model, for the error message.

    Raises:
        FishError: a layer is missing or has a different shape.
    """
    for module, layer in adapter.spec.layers.items():
        if linear_layers.get(module) != layer.shape:
            model_shape = linear_layers.get(module)
            difference = f"has shape {model_shape} there" if model_shape else "does not exist there"
            raise FishError(
                f"the adapter {adapter.path} (trained on {adapter.base}) does not fit the model {model}: "
                f"{module} should have shape {layer.shape} but {difference}; use the model that it was trained on."
            )
