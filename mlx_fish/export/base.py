"""The base's weights as plain float32 tensors, also of a base that MLX quantised: its original's, or its own expanded.

Expanding needs MLX; everything else is NumPy.
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
    """The base as plain float tensors, wherever they come from.

    Attributes:
        shapes: name -> shape in file order, without a tied head's second copy and without scales and biases.
        read: name -> float32 copy.
        dtype: the float type that most weights have; bfloat16 when they had to be expanded.
        expanded: the values are those of a quantised folder.
        original: they are those of the model that the quantised folder was made from.
    """

    path: Path
    config: Mapping[str, Any]
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Float32]
    expanded: bool = False
    original: bool = False


def plain_base(base: ModelFolder) -> PlainBase:
    """The base's values: its own, or those of its original when it is quantised and that is still on this machine.

    Raises FishError for a tensor whose values cannot be had in float32.
    """
    if base.quantization is None:
        return _of_folder(base)
    return find_original(base) or _of_folder(base)


def _of_folder(folder: ModelFolder) -> PlainBase:
    values = _FolderValues(folder)
    config = {**folder.config, "tie_word_embeddings": is_tied(folder)}
    expanded = folder.quantization is not None
    dtype = "bfloat16" if expanded else folder.weights.dtype
    return PlainBase(folder.path, config, dtype, values.shapes, values.read, expanded)


class _FolderValues:
    """The tensors of a plain model behind a folder that may be quantised."""

    def __init__(self, folder: ModelFolder):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._check_mode()
        tied = is_tied(folder)
        for name in folder.weights:
            module, _, kind = name.rpartition(".")
            if (tied and module == "lm_head") or name.endswith("rotary_emb.inv_freq"):
                continue  # every reader has the one from the embedding, the other from the config
            if not self._is_packed(module):
                self.shapes[name] = self._plain_shape(name)
            elif kind == "weight":
                rows, groups = folder.weights[f"{module}.scales"].shape
                self.shapes[name] = (rows, groups * self.folder.layer_quantization(module)[0])
            elif kind == "bias":
                self.shapes[name] = self._plain_shape(name)

    def read(self, name: str) -> Float32:
        """A float32 copy, expanded when it is quantised."""
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
                f"{self.folder.name} is quantised in the mode {settings['mode']}, and mlx-fish expands only affine; "
                "give the original model with --model."
            )
        try:
            import mlx_fish.backends.mlx.dequantize  # noqa: F401
        except ImportError as error:
            raise FishError(
                f"{self.folder.name} was quantised by MLX, which is needed to expand it and is not installed; "
                "give the original model with --model."
            ) from error

    def _is_packed(self, module: str) -> bool:
        weight = self.folder.weights.get(f"{module}.weight")
        return self.folder.quantization is not None and weight is not None and weight.dtype == "U32"

    def _plain_shape(self, name: str) -> tuple[int, ...]:
        info = self.folder.weights[name]
        if info.dtype not in NAMES:
            raise FishError(
                f"{self.folder.name} stores {name} as {info.dtype}, which cannot be merged; give a model in float32, "
                "float16 or bfloat16 with --model."
            )
        return info.shape


def is_tied(folder: ModelFolder) -> bool:
    """The head is the embedding. Where the config does not say, a model without a head of its own is tied."""
    return bool(folder.config.get("tie_word_embeddings", "lm_head.weight" not in folder.weights))


def find_original(base: ModelFolder) -> PlainBase | None:
    """The unquantised model that a quantised folder was converted from, when it is still on this machine.

    A folder, a GGUF file, or a Hub model in the local cache; nothing is fetched. Only one with the recorded fingerprint
    will do: another model may lie there by now.
    """
    name = base.record.get("source")
    if not isinstance(name, str):
        return None
    path = _cached(name, base.revision) if is_hub_id(name) else Path(name)
    try:
        if path is not None and path.suffix == ".gguf" and path.is_file():
            source = open_source(str(path))
            found = PlainBase(path, source.config, source.dtype, source.shapes, source.read, original=True)
            return found if source.fingerprint == base.fingerprint else None
        if path is None or not (path / "config.json").is_file():
            return None
        folder = ModelFolder(path, base.name, base.revision)
        same = folder.quantization is None and folder.fingerprint == base.fingerprint
        return replace(_of_folder(folder), original=True) if same else None
    except FishError:  # broken or half deleted since: no original to use
        return None


def _cached(name: str, revision: str | None) -> Path | None:
    """A Hub model that lies in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
