"""Convert a model folder, Hub model or GGUF file to a folder that both mlx-lm and transformers can load.

Uses only NumPy, one tensor at a time; quantisation is left to a backend. Independent of the command line.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx_fish
from mlx_fish.errors import FishError
from mlx_fish.models.folder import RECORD
from mlx_fish.models.hub import DEFAULT_MODEL, MODELS_DIR, locate
from mlx_fish.models.source import HEAD, Source, open_source
from mlx_fish.storage.files import check_target, new_folder, write_json
from mlx_fish.storage.tensors import DTYPES, write_shards

MADE_BY = "mlx-fish convert"
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
_SPARE_BYTES = 100_000_000  # for the tokenizer, the config and file system overhead

Progress = Callable[[int, int], None]
"""Called with (bytes written, total bytes)."""


class Quantizer(Protocol):
    """Quantises the weight matrices of a model folder in mlx-lm's format. Implemented by a backend."""

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    def quantize_folder(
        self,
        source: Path,
        target: Path,
        *,
        config: dict[str, Any],
        dtype: str,
        progress: Callable[[int], None] = ...,
    ) -> dict[str, Any]:
        """Write the quantised weights of the model folder `source` to `target`.

        Args:
            config: the config.json of the model.
            dtype: the dtype of scales, biases and unquantised tensors.
            progress: called after each tensor with its size in bytes.

        Returns:
            The config with a `quantization` entry.
        """
        ...


@dataclass(frozen=True)
class ConvertResult:
    """The result of a conversion.

    Attributes:
        path: the folder written.
        num_parameters: parameters before quantisation.
        dtype: the dtype of unquantised tensors.
        num_bytes: total size of the weight files.
        source, revision: the converted model and its commit, as recorded in the folder.
        quantization: bits and group size; None if not quantised.
    """

    path: Path
    num_parameters: int
    dtype: str
    num_bytes: int
    seconds: float
    source: str
    revision: str | None
    quantization: dict[str, int] | None


def convert(
    *,
    model: str | None = None,
    out: Path | None = None,
    dtype: str | None = None,
    quantizer: Quantizer | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> ConvertResult:
    """Convert `model` to a model folder at `out`. The folder is written atomically.

    Args:
        model: a Hub id, a folder or a .gguf file; None: `DEFAULT_MODEL`.
        out: the folder to write; None: `models/<name>-mlx`.
        dtype: float32, float16 or bfloat16; None: the source's dtype (bfloat16 for a quantised GGUF file).
        quantizer: quantises the weight matrices (`backends.choose.load_quantizer`); None: no quantisation.
        progress: called with (bytes written, total bytes).

    Raises:
        FishError: the options are invalid or `out` exists (both checked before any download), the source
            cannot be converted, or the disk is full.
    """
    started = time.monotonic()
    name = DEFAULT_MODEL if model is None else model
    target = out if out is not None else default_out(name)
    _check_dtype(dtype)
    check_target(target, marker=RECORD, overwrite=overwrite)
    local = locate(name)
    if local is not None and target.exists() and target.samefile(local):
        raise FishError(f"{target} is the model to convert itself; choose another --out.")
    source = open_source(name)
    dtype = dtype or source.dtype
    if quantizer is not None:
        _check_group_size(source, quantizer.group_size)
    _check_space(target, source, dtype, quantizer)
    with new_folder(target, marker=RECORD, overwrite=overwrite) as folder:
        if quantizer is None:
            config = _write_unquantized(source, folder, dtype, progress)
            quantization = None
        else:
            config = _write_quantized(source, folder, dtype, quantizer, progress)
            quantization = {"bits": quantizer.bits, "group_size": quantizer.group_size}
        _write_small_files(source, folder, config, dtype, quantization)
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    seconds = time.monotonic() - started
    return ConvertResult(
        target, source.num_parameters, dtype, num_bytes, seconds, source.name, source.revision, quantization
    )


def default_out(name: str, models_dir: Path = MODELS_DIR) -> Path:
    """Return the default output folder, such as `models/Qwen2-0.5B-mlx` for `Qwen/Qwen2-0.5B`.

    For a folder or a .gguf file, the name is the last component of its path.
    """
    path = locate(name, models_dir=models_dir)
    base_name = path.resolve().name if path else name.split("/")[-1]
    return models_dir / f"{base_name.removesuffix('.gguf')}-mlx"


def _write_unquantized(source: Source, folder: Path, dtype: str, progress: Progress) -> dict[str, Any]:
    """Write the weights in `dtype` and return the config."""
    total, done = source.num_parameters * DTYPES[dtype][1], 0

    def report(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    write_shards(folder, source.shapes, source.read, dtype=dtype, progress=report)
    return source.config


def _write_quantized(
    source: Source, folder: Path, dtype: str, quantizer: Quantizer, progress: Progress
) -> dict[str, Any]:
    """Write the quantised weights and return the config with its `quantization` entry."""
    total, done = _quantized_bytes(source, dtype, quantizer.bits, quantizer.group_size), 0
    unquantized_folder = folder / "floats"  # a GGUF file is first expanded to safetensors, which mlx-lm can load
    if source.folder is None:
        unquantized_folder.mkdir()
        write_shards(unquantized_folder, source.shapes, source.read, dtype=dtype)
        write_json(unquantized_folder / "config.json", source.config)

    def report(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(min(done, total), total)

    config = quantizer.quantize_folder(
        source.folder or unquantized_folder, folder, config=source.config, dtype=dtype, progress=report
    )
    shutil.rmtree(unquantized_folder, ignore_errors=True)
    return config


def _write_small_files(
    source: Source, folder: Path, config: dict[str, Any], dtype: str, quantization: dict[str, int] | None
) -> None:
    """Write the config, generation config, tokenizer and mlx-fish record."""
    # mlx-lm and transformers have different defaults for tie_word_embeddings, so it is always written.
    tied = bool(config.get("tie_word_embeddings", HEAD not in source.shapes))
    config = {**config, "tie_word_embeddings": tied, "dtype": dtype, "torch_dtype": dtype}
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)
    token_ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    default_generation_config = {key: value for key, value in token_ids.items() if value is not None}
    write_json(folder / "generation_config.json", source.generation_config or default_generation_config)
    source.write_tokenizer(folder)
    record = {
        "made_by": MADE_BY,
        "version": mlx_fish.__version__,
        "source": source.name,
        "revision": source.revision,
        "dtype": dtype,
        "quantization": quantization,
        "fingerprint": source.fingerprint,
    }
    write_json(folder / RECORD, record)


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise FishError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")


def _check_group_size(source: Source, group_size: int) -> None:
    """Raise a FishError if the input size of a weight matrix is not a multiple of the group size."""
    for name, shape in source.shapes.items():
        if len(shape) == 2 and shape[-1] % group_size:
            valid_sizes = [size for size in GROUP_SIZES if shape[-1] % size == 0]
            advice = f"use --group-size {valid_sizes[-1]}" if valid_sizes else "omit -q"
            raise FishError(f"{name} has {shape[-1]} inputs, not a multiple of the group size {group_size}; {advice}.")


def _quantized_bytes(source: Source, dtype: str, bits: int, group_size: int) -> int:
    """Return the size in bytes of the quantised model.

    Matrices are stored as packed weights with one scale and one bias in `dtype` per group, all other tensors
    in `dtype`.
    """
    width = DTYPES[dtype][1]
    return sum(
        math.prod(shape) * bits // 8 + 2 * width * math.prod(shape) // group_size
        if len(shape) == 2
        else math.prod(shape) * width
        for shape in source.shapes.values()
    )


def _check_space(target: Path, source: Source, dtype: str, quantizer: Quantizer | None) -> None:
    """Raise a FishError if the disk lacks the space for the conversion."""
    unquantized_bytes = source.num_parameters * DTYPES[dtype][1]
    needed = (
        unquantized_bytes if quantizer is None else _quantized_bytes(source, dtype, quantizer.bits, min(GROUP_SIZES))
    )
    if quantizer is not None and source.folder is None:
        needed += unquantized_bytes  # the expanded copy
    existing = Path(target).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed + _SPARE_BYTES:
        raise FishError(
            f"{target} needs {(needed + _SPARE_BYTES) / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; "
            "free some disk space, or choose another --out."
        )
