"""Read the base model's weights as plain float32 tensors, also if MLX quantised the base.

For a quantised base, the values come from the original model if it is still on this machine, else they are
dequantised. Only dequantising needs MLX; everything else is NumPy.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fish.errors import FishError
from mlx_fish.models.folder import ModelFolder
from mlx_fish.models.hub import is_hub_id
from mlx_fish.models.source import open_source
from mlx_fish.storage.tensors import NAMES, Float32


@dataclass(frozen=True)
class PlainBase:
    """The base model as unquantised tensors, independent of how they are stored.

    Attributes:
        path: the model folder or GGUF file that the values come from.
        dtype: the dtype of most weights; bfloat16 if they were dequantised.
        shapes: tensor name -> shape, in file order, without a tied head's second copy and without scales and
            biases.
        read: tensor name -> float32 copy.
        expanded: the values were dequantised from a quantised folder.
        original: the values are from the model that the quantised folder was made from.
    """

    path: Path
    config: Mapping[str, Any]
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Float32]
    expanded: bool = False
    original: bool = False


def plain_base(base: ModelFolder) -> PlainBase:
    """Return the base's unquantised tensors, from the original model if the base is quantised.

    If the original is not on this machine, the base is dequantised.

    Raises:
        FishError: a tensor cannot be read as float32.
    """
    if base.quantization is None:
        return _from_folder(base)
    return find_original(base) or _from_folder(base)


def _from_folder(folder: ModelFolder) -> PlainBase:
    values = _FolderValues(folder)
    config = {**folder.config, "tie_word_embeddings": is_tied(folder)}
    expanded = folder.quantization is not None
    dtype = "bfloat16" if expanded else folder.weights.dtype
    return PlainBase(folder.path, config, dtype, values.shapes, values.read, expanded)


class _FolderValues:
    """The unquantised tensors of a model folder that may be quantised."""

    def __init__(self, folder: ModelFolder):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._check_mode()
        tied = is_tied(folder)
        for name in folder.weights:
            module, _, kind = name.rpartition(".")
            if (tied and module == "lm_head") or name.endswith("rotary_emb.inv_freq"):
                continue  # every reader derives the head from the embedding, and inv_freq from the config
            if not self._is_packed(module):
                self.shapes[name] = self._plain_shape(name)
            elif kind == "weight":
                rows, groups = folder.weights[f"{module}.scales"].shape
                self.shapes[name] = (rows, groups * self.folder.layer_quantization(module)[0])
            elif kind == "bias":
                self.shapes[name] = self._plain_shape(name)

    def read(self, name: str) -> Float32:
        """Return a float32 copy of a tensor, dequantised if necessary."""
        weights = self.folder.weights
        module, _, kind = name.rpartition(".")
        if kind != "weight" or not self._is_packed(module):
            return weights.read(name)
        from mlx_fish.backends.mlx.dequantize import dequantize

        group_size, bits = self.folder.layer_quantization(module)
        packed = np.frombuffer(weights.raw(name), "<u4").reshape(weights[name].shape)
        scales, biases = weights.read(f"{module}.scales"), weights.read(f"{module}.biases")
        return dequantize(packed, scales, biases, group_size=group_size, bits=bits)

    def _check_mode(self) -> None:
        settings = self.folder.quantization
        if settings is None:
            return
        if settings.get("mode", "affine") != "affine":
            raise FishError(
                f"{self.folder.name} uses the quantisation mode {settings['mode']}, but mlx-fish can dequantise only affine; "
                "pass the original model with --model."
            )
        try:
            import mlx_fish.backends.mlx.dequantize  # noqa: F401
        except ImportError as error:
            raise FishError(
                f"{self.folder.name} was quantised by MLX, and MLX is not installed to dequantise it; "
                "install it, or pass the original model with --model."
            ) from error

    def _is_packed(self, module: str) -> bool:
        weight = self.folder.weights.get(f"{module}.weight")
        return self.folder.quantization is not None and weight is not None and weight.dtype == "U32"

    def _plain_shape(self, name: str) -> tuple[int, ...]:
        info = self.folder.weights[name]
        if info.dtype not in NAMES:
            raise FishError(
                f"{self.folder.name} stores {name} as {info.dtype}, which cannot be merged; pass a model in float32, "
                "float16 or bfloat16 with --model."
            )
        return info.shape


def is_tied(folder: ModelFolder) -> bool:
    """Return whether the head shares the embedding matrix; if the config omits this, a missing head implies it."""
    return bool(folder.config.get("tie_word_embeddings", "lm_head.weight" not in folder.weights))


def find_original(base: ModelFolder) -> PlainBase | None:
    """Return the model that a quantised folder was converted from; None if it is not on this machine.

    The original is a folder, a GGUF file, or a Hub model in the local cache; nothing is downloaded. Its
    fingerprint must match the recorded one, because the path may hold another model by now.
    """
    name = base.record.get("source")
    if not isinstance(name, str):
        return None
    path = _cached_folder(name, base.revision) if is_hub_id(name) else Path(name)
    try:
        if path is not None and path.suffix == ".gguf" and path.is_file():
            source = open_source(str(path))
            original = PlainBase(path, source.config, source.dtype, source.shapes, source.read, original=True)
            return original if source.fingerprint == base.fingerprint else None
        if path is None or not (path / "config.json").is_file():
            return None
        folder = ModelFolder(path, base.name, base.revision)
        matches = folder.quantization is None and folder.fingerprint == base.fingerprint
        return replace(_from_folder(folder), original=True) if matches else None
    except FishError:  # damaged or partly deleted since the conversion
        return None


def _cached_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of a Hub model in the local cache; None if it is not cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
