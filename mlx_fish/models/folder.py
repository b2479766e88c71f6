"""Read a model folder: config, end tokens, tokenizer files, linear layers and fingerprint.

Loads no framework. Supports Hugging Face and mlx-lm folders; `convert` writes folders that are both. In
folders written by mlx-fish, `mlx_fish.json` records the origin of the model.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_fish.errors import FishError
from mlx_fish.storage.files import read_json, write_json, write_text
from mlx_fish.storage.tensors import NAMES, Float32, Weights, decode, encode, open_weights

RECORD = "mlx_fish.json"
FINGERPRINT_VALUES = 1024
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_BLOCK_WEIGHT = re.compile(r"(model\.layers\.(\d+)\.[\w.]+)\.weight")


@dataclass(frozen=True)
class ModelFolder:
    """A local model folder. Files are read on first access.

    Attributes:
        name: the name shown to users: the Hub id or the folder that the model came from.
        revision: the commit hash of a Hub model.
    """

    path: Path
    name: str
    revision: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json with both RoPE formats (`with_both_rope_forms`), and without references to custom code."""
        path = self.path / "config.json"
        if not path.is_file():
            raise FishError(f"{self.path} has no config.json; a Hugging Face or mlx-lm model folder was expected.")
        config = read_json(path)
        if "model_file" in config:
            raise FishError(f"{path} asks to run the model's own code (`model_file`), which mlx-fish never does.")
        config.pop("auto_map", None)
        return with_both_rope_forms(config)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, empty if there is none."""
        path = self.path / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def record(self) -> dict[str, Any]:
        """The folder's origin as recorded by `convert` or `fuse`, empty for a folder not written by mlx-fish."""
        path = self.path / RECORD
        return read_json(path) if path.is_file() else {}

    @cached_property
    def weights(self) -> Weights:
        """The stored tensors."""
        return open_weights(self.path)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The ids of the tokens that end generation, from the generation config, else from the config."""
        ids = self.generation_config.get("eos_token_id", self.config.get("eos_token_id"))
        if ids is None:
            return ()
        return tuple(ids) if isinstance(ids, list) else (int(ids),)

    @property
    def attends_in_windows(self) -> bool:
        """Whether any layer uses sliding-window attention."""
        layer_types = self.config.get("layer_types") or ()
        return any("sliding" in layer_type for layer_type in layer_types) or bool(self.config.get("use_sliding_window"))

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The settings `{"group_size", "bits"}` if MLX quantised the folder, else None."""
        settings = self.config.get("quantization")
        return settings if isinstance(settings, dict) else None

    def layer_quantization(self, module: str) -> tuple[int, int]:
        """Return (group size, bits) of a layer of a quantised folder; they may differ between layers."""
        settings = self.quantization
        assert settings is not None, "the folder is not quantised"
        overrides = settings.get(module)
        layer_settings = {**settings, **overrides} if isinstance(overrides, dict) else settings
        return int(layer_settings["group_size"]), int(layer_settings["bits"])

    @cached_property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """The linear layers of the transformer blocks: Hugging Face module path -> (out_features, in_features).

        Raises:
            FishError: there are none.
        """
        layers: dict[str, tuple[int, int]] = {}
        for name, info in self.weights.items():
            match = _BLOCK_WEIGHT.fullmatch(name)
            if match is None or len(info.shape) != 2:
                continue
            out_features, in_features = info.shape
            if info.dtype == "U32" and self.quantization:
                in_features = self.weights[f"{match[1]}.scales"].shape[1] * self.layer_quantization(match[1])[0]
            layers[match[1]] = (out_features, in_features)
        if not layers:
            raise FishError(f"{self.path} has no linear layers named model.layers.N.…; is it a causal language model?")
        return layers

    @property
    def num_parameters(self) -> int:
        """Number of parameters before quantisation; a tied head is counted once."""
        if not self.quantization:
            return self.weights.num_parameters
        total = 0
        for name, info in self.weights.items():
            size = 1
            for extent in info.shape:
                size *= extent
            if info.dtype == "U32":
                total += size * 32 // self.layer_quantization(name.removesuffix(".weight"))[1]
            elif not name.endswith((".scales", ".biases")):
                total += size
        return total

    @cached_property
    def fingerprint(self) -> str:
        """Hash that identifies the base model, independent of the float dtype it is stored in.

        It distinguishes models of identical shape: a sha256 of the names, shapes and first values of all
        tensors, rounded to bfloat16. A converted folder records the fingerprint of its source, because
        quantised values would change it.
        """
        recorded = self.record.get("fingerprint")
        if isinstance(recorded, str):
            return recorded
        return fingerprint_of({name: info.shape for name, info in self.weights.items()}, self._first_values)

    def _first_values(self, name: str) -> Float32 | None:
        info = self.weights[name]
        if info.dtype not in NAMES:
            return None
        item_size = (info.end - info.start) // max(1, _size(info.shape))
        return decode(self.weights.raw(name)[: FINGERPRINT_VALUES * item_size], info.dtype, name)


def fingerprint_of(shapes: Mapping[str, tuple[int, ...]], first_values: Callable[[str], Float32 | None]) -> str:
    """Return the fingerprint of a model.

    Args:
        shapes: tensor name -> shape.
        first_values: returns the first `FINGERPRINT_VALUES` values of a tensor, or None if they are not
            included.
    """
    digest = hashlib.sha256()
    for name in sorted(shapes):
        digest.update(f"{name}{list(shapes[name])}".encode())
        values = first_values(name)
        if values is not None:
            digest.update(encode(values, "bfloat16"))
    return digest.hexdigest()


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def with_both_rope_forms(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with both `rope_theta` and `rope_parameters`, if it has one of them.

    transformers 5 writes only `rope_parameters`; mlx-lm and Ollama read only `rope_theta`, and silently use a
    different base without it.
    """
    config = dict(config)
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        config.setdefault("rope_theta", parameters["rope_theta"])
        if parameters.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {k: v for k, v in parameters.items() if k != "rope_theta"})
    elif "rope_theta" in config:
        scaling = config.get("rope_scaling") or {"rope_type": "default"}
        config["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"]}
    return config


def copy_tokenizer(source: Path, target: Path, *, chat_template: str | None = None) -> None:
    """Copy the tokenizer files, with the chat template in both chat_template.jinja and tokenizer_config.json.

    Args:
        chat_template: replaces the source's own template.

    Raises:
        FishError: the source has no tokenizer.json.
    """
    if not (source / "tokenizer.json").is_file():
        raise FishError(f"{source} has no tokenizer.json; download the model's tokenizer files.")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config_path = target / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    config.pop("auto_map", None)
    jinja_path = target / "chat_template.jinja"
    if chat_template is None:
        stored = config.get("chat_template")
        if jinja_path.is_file():  # transformers prefers the file
            chat_template = jinja_path.read_text(encoding="utf-8")
        elif isinstance(stored, str):
            chat_template = stored
    if chat_template is not None:
        write_text(jinja_path, chat_template)
        config["chat_template"] = chat_template
    write_json(config_path, config)
