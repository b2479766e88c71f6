"""Safetensors files <-> NumPy, one tensor at a time, bfloat16 included.

The format: https://huggingface.co/docs/safetensors. NumPy has no bfloat16, so it is read and written as the upper
16 bits of a float32, rounded to nearest even. Knows nothing of models or LoRA.
"""

import json
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_fish.errors import FishError
from mlx_fish.files import is_path, read_json, write_bytes

Float32 = npt.NDArray[np.float32]
DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
NAMES = {stored: name for name, (stored, _) in DTYPES.items()}
SHARD_BYTES = 5_000_000_000
# Elements cast at a time: bounds the memory, and stays in the cache (measured: 3 times faster than 1 << 24).
_PIECE = 1 << 18


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` and `end` are byte offsets in `file`; `dtype` is safetensors' name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


class Weights(Mapping[str, TensorInfo]):
    """The tensors of a model folder, in file order. `read` copies one out as float32."""

    def __init__(self, infos: list[TensorInfo]):
        self._infos = {info.name: info for info in infos}
        self._maps: dict[Path, mmap.mmap] = {}

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def raw(self, name: str) -> memoryview:
        """The stored bytes, without a copy."""
        info = self._infos[name]
        if info.file not in self._maps:
            with open(info.file, "rb") as file:
                self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._maps[info.file])[info.start : info.end]

    def read(self, name: str) -> Float32:
        """A float32 copy of the tensor (float types only)."""
        info = self._infos[name]
        return decode(self.raw(name), info.dtype, name).reshape(info.shape)

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(info.shape)) for info in self._infos.values())

    @property
    def dtype(self) -> str:
        """The dtype that most elements have, by its NumPy-like name (`bfloat16`)."""
        sizes: dict[str, int] = {}
        for info in self._infos.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.end - info.start
        most = max(sizes, key=lambda dtype: sizes[dtype])
        return NAMES.get(most, most)


def decode(raw: memoryview | bytes, dtype: str, name: str = "tensor") -> Float32:
    """Stored little-endian bytes -> flat float32 array, always a copy."""
    if dtype == "F32":
        return np.frombuffer(raw, "<f4").astype(np.float32)
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if dtype == "BF16":
        bits = np.frombuffer(raw, "<u2").astype(np.uint32)
        bits <<= 16  # in place: an embedding is half a gigabyte
        return bits.view(np.float32)
    raise FishError(f"{name} is stored as {dtype}; F32, F16 or BF16 was expected.")


def encode(array: Float32, dtype: str, name: str = "tensor") -> bytes:
    """Float32 -> stored bytes in `dtype` (float32, float16, bfloat16), rounded to nearest even.

    Raises:
        FishError: a finite value is too large for float16.
    """
    if dtype == "float32":
        return np.ascontiguousarray(array, "<f4").tobytes()
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = array.astype("<f2")
        if np.isinf(half).any() and not np.isinf(array).any():
            raise FishError(f"{name} has values beyond float16's 65504; use bfloat16 or float32.")
        return half.tobytes()
    assert dtype == "bfloat16", dtype
    bits = np.ascontiguousarray(array, "<f4").view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    rounded = np.where(np.isnan(array), 0x7FC0, rounded)  # rounding would carry a NaN into the sign
    return rounded.astype("<u2").tobytes()


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Tensor infos and metadata of one safetensors file; the safetensors library checks the file first."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np"):
            pass  # opening validates the header: sizes, overlaps, holes
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except OSError as error:
        raise FishError(f"cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # the library raises its own SafetensorError and more
        raise FishError(f"{path} is not a valid safetensors file ({error}); fetch it again.") from error
    metadata = header.pop("__metadata__", {})
    infos = []
    for name, entry in header.items():
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        infos.append(TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, start, end))
    return sorted(infos, key=lambda info: info.start), metadata


def open_weights(folder: Path) -> Weights:
    """The weights of a Hugging Face or mlx-lm folder, single file or sharded.

    Raises:
        FishError: no safetensors (pickles are never read), a shard is missing, or a shard's name leaves the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise FishError(f"{index} has no `weight_map` from tensor names to file names; fetch it again.")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not is_path(name) or not name.endswith(".safetensors"):
                raise FishError(f"{index} names the file {name!r}; plain .safetensors names were expected.")
            if not (folder / name).is_file():
                raise FishError(f"{folder} lacks {name}, which its index names; fetch it again.")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        because = "only pickled weights, which can run code and are never read" if pickles else "no model*.safetensors"
        raise FishError(f"{folder} holds {because}; a folder with safetensors was expected.")
    return Weights([info for file in files for info in read_header(file)[0]])


def write_safetensors(path: Path, arrays: Mapping[str, Float32], metadata: dict[str, str] | None = None) -> None:
    """Write small float32 arrays (an adapter, optimizer moments) whole, in the order given, or not at all.

    Raises:
        FishError: a tensor is not finite; such numbers are worth nothing, and are never written.
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise FishError(f"{name} is not finite; {path} was not written.")
    header = _header({name: array.shape for name, array in arrays.items()}, "float32", metadata)
    write_bytes(path, header + b"".join(encode(array, "float32") for array in arrays.values()))


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Float32],
    *,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> int:
    """Stream tensors into `model.safetensors`, or into numbered shards with an index above `shard_bytes`.

    Args:
        shapes: every tensor and its shape, in the order in which `read` will be asked for them.
        read: name -> float32 array of that shape; at most one is held.
        dtype: the stored type of them all.
        progress: called with the bytes written after each tensor.

    Returns:
        the bytes of all tensors together.
    """
    width = DTYPES[dtype][1]
    sizes = {name: int(np.prod(shape, dtype=np.int64)) * width for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / file_name, "wb") as file:
            file.write(_header({name: shapes[name] for name in names}, dtype, {"format": "pt"}))
            for name in names:
                array = read(name)
                assert array.shape == shapes[name], (name, array.shape, shapes[name])
                flat = array.reshape(-1)
                for start in range(0, max(flat.size, 1), _PIECE):
                    file.write(encode(flat[start : start + _PIECE], dtype, name))
                weight_map[name] = file_name
                progress(sizes[name])
    total = sum(sizes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: str, metadata: dict[str, str] | None) -> bytes:
    stored, width = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape, dtype=np.int64)) * width
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
