"""`mlx-fish convert`: any model folder, Hub model or GGUF file -> a folder that mlx-lm and transformers both load.

This is NumPy alone, a tensor at a time; quantising is a backend's work. Knows nothing of the terminal.
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
_SPARE_BYTES = 100_000_000  # tokenizer, config, and what the file system takes

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Quantizer(Protocol):
    """Packs the matrices of a model folder into few bits, as mlx-lm stores them. A backend provides it."""

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
        """Write the quantised weights of the folder `source` into `target`; returns the config with `quantization` in it."""
        ...


@dataclass(frozen=True)
class ConvertResult:
    """What was written. `num_parameters` counts before quantisation; `num_bytes` is the weight files' size."""

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
    """Write `model` as a model folder at `out`, whole or not at all.

    Args:
        model: a Hub id, a folder or a .gguf file; None: `DEFAULT_MODEL`.
        out: None: `models/<name>-mlx`.
        dtype: float32, float16 or bfloat16; None keeps the source's (bfloat16 for a quantised GGUF).
        quantizer: quantises the matrices (`backends.choose.load_quantizer`); None leaves them as they are.

    Raises:
        FishError: bad options or a taken `out` (before anything is fetched), an unusable source, a full disk.
    """
    started = time.monotonic()
    name = DEFAULT_MODEL if model is None else model
    target = out if out is not None else default_out(name)
    _check_dtype(dtype)
    check_target(target, marker=RECORD, overwrite=overwrite)
    local = locate(name)
    if local is not None and target.exists() and target.samefile(local):
        raise FishError(f"{target} is the model to convert itself; write somewhere else with --out.")
    source = open_source(name)
    dtype = dtype or source.dtype
    if quantizer is not None:
        _check_groups(source, quantizer.group_size)
    _check_space(target, source, dtype, quantizer)
    with new_folder(target, marker=RECORD, overwrite=overwrite) as folder:
        if quantizer is None:
            config = _write_floats(source, folder, dtype, progress)
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
    """`Qwen/Qwen2-0.5B` -> `models/Qwen2-0.5B-mlx`; a folder or a .gguf file by its own name."""
    path = locate(name, models_dir=models_dir)
    last = path.resolve().name if path else name.split("/")[-1]
    return models_dir / f"{last.removesuffix('.gguf')}-mlx"


def _write_floats(source: Source, folder: Path, dtype: str, progress: Progress) -> dict[str, Any]:
    total, done = source.num_parameters * DTYPES[dtype][1], 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    write_shards(folder, source.shapes, source.read, dtype=dtype, progress=count)
    return source.config


def _write_quantized(
    source: Source, folder: Path, dtype: str, quantizer: Quantizer, progress: Progress
) -> dict[str, Any]:
    total, done = _quantized_bytes(source, dtype, quantizer.bits, quantizer.group_size), 0
    floats = folder / "floats"  # a GGUF file is expanded first, for mlx-lm to load
    if source.folder is None:
        floats.mkdir()
        write_shards(floats, source.shapes, source.read, dtype=dtype)
        write_json(floats / "config.json", source.config)

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(min(done, total), total)

    config = quantizer.quantize_folder(
        source.folder or floats, folder, config=source.config, dtype=dtype, progress=count
    )
    shutil.rmtree(floats, ignore_errors=True)
    return config


def _write_small_files(
    source: Source, folder: Path, config: dict[str, Any], dtype: str, quantization: dict[str, int] | None
) -> None:
    # mlx-lm and transformers disagree about the default of tie_word_embeddings, so it is always written.
    tied = bool(config.get("tie_word_embeddings", HEAD not in source.shapes))
    config = {**config, "tie_word_embeddings": tied, "dtype": dtype, "torch_dtype": dtype}
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)
    ends = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    made = {key: value for key, value in ends.items() if value is not None}
    write_json(folder / "generation_config.json", source.generation_config or made)
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
        raise FishError(f"--dtype {dtype}: {', '.join(DTYPES)} was expected.")


def _check_groups(source: Source, group_size: int) -> None:
    for name, shape in source.shapes.items():
        if len(shape) == 2 and shape[-1] % group_size:
            fitting = [size for size in GROUP_SIZES if shape[-1] % size == 0]
            advice = f"use --group-size {fitting[-1]}" if fitting else "leave -q out"
            raise FishError(f"{name} has {shape[-1]} inputs, no multiple of the group size {group_size}; {advice}.")


def _quantized_bytes(source: Source, dtype: str, bits: int, group_size: int) -> int:
    """Packed weights, and a scale and a bias in `dtype` for each group; the rest stays in `dtype`."""
    width = DTYPES[dtype][1]
    return sum(
        math.prod(shape) * bits // 8 + 2 * width * math.prod(shape) // group_size
        if len(shape) == 2
        else math.prod(shape) * width
        for shape in source.shapes.values()
    )


def _check_space(target: Path, source: Source, dtype: str, quantizer: Quantizer | None) -> None:
    floats = source.num_parameters * DTYPES[dtype][1]
    needed = floats if quantizer is None else _quantized_bytes(source, dtype, quantizer.bits, min(GROUP_SIZES))
    if quantizer is not None and source.folder is None:
        needed += floats  # the expanded copy
    place = Path(target).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + _SPARE_BYTES:
        raise FishError(
            f"{target} needs {(needed + _SPARE_BYTES) / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room, or choose "
            "another --out."
        )
