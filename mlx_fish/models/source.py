"""Open a model for conversion through one interface, stored as a Hugging Face folder or a GGUF file."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fish.errors import FishError
from mlx_fish.models.folder import FINGERPRINT_VALUES, ModelFolder, copy_tokenizer, fingerprint_of, with_both_rope_forms
from mlx_fish.models.gguf.model import GgufModel
from mlx_fish.models.gguf.tokenizer import write_tokenizer
from mlx_fish.models.hub import find_model
from mlx_fish.storage.tensors import NAMES, Float32

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Source:
    """A model to convert, independent of its storage format.

    Attributes:
        name: Hub id, or path of the folder or GGUF file.
        revision: commit hash of a Hub model.
        config, generation_config: the contents of config.json and generation_config.json.
        fingerprint: see `ModelFolder.fingerprint`.
        dtype: the dtype of most weights.
        shapes: tensor name -> shape, in the order to write.
        read: returns a tensor by name as a float32 array.
        folder: the folder with the model as safetensors; None for a GGUF file.
        write_tokenizer: writes the tokenizer files into a folder.
    """

    name: str
    revision: str | None
    config: dict[str, Any]
    generation_config: dict[str, Any]
    fingerprint: str
    dtype: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Float32]
    folder: Path | None
    write_tokenizer: Callable[[Path], None]

    @property
    def num_parameters(self) -> int:
        """Total number of elements of the tensors to write."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def open_source(name: str, *, revision: str | None = None) -> Source:
    """Find a model and check that it can be converted.

    For a folder that MLX quantised, the original model it was converted from is opened instead.

    Raises:
        FishError: the model is not found, or its format is not supported.
    """
    if name.endswith(".gguf") and "\0" not in name:
        return _gguf_source(Path(name).expanduser())
    folder = find_model(name, revision=revision)
    if folder.quantization is None:
        return _folder_source(folder)
    original = folder.record.get("source")
    if not isinstance(original, str) or Path(original) == folder.path.resolve():
        raise FishError(
            f"{folder.path} was quantised by MLX to {folder.quantization.get('bits')} bits, and dequantising it would "
            "not restore the lost precision; convert the original model instead."
        )
    return open_source(original, revision=folder.revision)


def _folder_source(folder: ModelFolder) -> Source:
    config, weights = folder.config, folder.weights
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise FishError(
            f"{folder.name} has quantised weights (method {method}), which are not supported; "
            "convert the unquantised model."
        )
    names = [name for name in weights if not name.endswith(".rotary_emb.inv_freq")]  # recomputed from the config
    if HEAD in weights and config.get("tie_word_embeddings"):
        names.remove(HEAD)
    elif HEAD not in weights and config.get("tie_word_embeddings") is False:
        raise FishError(
            f"{folder.path} has no {HEAD}, although tie_word_embeddings is false in its config.json; download it again."
        )
    for name in names:
        if weights[name].dtype not in NAMES:
            stored = weights[name].dtype
            raise FishError(f"{folder.name} stores {name} as {stored}; float32, float16 or bfloat16 was expected.")
    if not (folder.path / "tokenizer.json").is_file():
        raise FishError(f"{folder.path} has no tokenizer.json; download the model's tokenizer files.")
    return Source(
        name=folder.name,
        revision=folder.revision,
        config=config,
        generation_config=folder.generation_config,
        fingerprint=folder.fingerprint,
        dtype=weights.dtype,
        shapes={name: weights[name].shape for name in names},
        read=weights.read,
        folder=folder.path,
        write_tokenizer=lambda target: copy_tokenizer(folder.path, target),
    )


def _gguf_source(path: Path) -> Source:
    model = GgufModel(path)
    shapes = model.shapes

    def first_values(name: str) -> Float32:
        num_rows = (
            -(-FINGERPRINT_VALUES // math.prod(shapes[name][1:])) if len(shapes[name]) > 1 else FINGERPRINT_VALUES
        )
        return model.read(name, rows=num_rows).reshape(-1)[:FINGERPRINT_VALUES]

    return Source(
        name=str(path.resolve()),
        revision=None,
        config=with_both_rope_forms(model.config),
        generation_config=model.generation_config,
        fingerprint=fingerprint_of(shapes, first_values),
        dtype=model.dtype,
        shapes=shapes,
        read=model.read,
        folder=None,
        write_tokenizer=lambda target: write_tokenizer(model.file.metadata, target, source=path),
    )
