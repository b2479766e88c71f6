"""Read and write safetensors files with NumPy, one tensor at a time, including bfloat16 (via `ml_dtypes`).

Format: https://huggingface.co/docs/safetensors. Independent of models and adapters.
"""

import json
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mlx_fish.errors import FishError
from mlx_fish.storage.files import is_path, read_json, write_bytes

Float32 = npt.NDArray[np.float32]
DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
NAMES = {stored: name for name, (stored, _) in DTYPES.items()}
_NUMPY_TYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_WIDTHS = {**dict(DTYPES.values()), "U32": 4}
SHARD_BYTES = 5_000_000_000
# Elements cast at a time: bounds memory use and fits into the CPU cache (measured: 3 times faster than 1 << 24).
_PIECE = 1 << 18


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype, shape and location of a stored tensor.

    Attributes:
        dtype: the safetensors name, such as `BF16`.
        start, end: byte offsets in `file`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


class Weights(Mapping[str, TensorInfo]):
    """Read-only mapping from tensor name to `TensorInfo` for a model folder, in file order.

    The files are memory-mapped: `raw` returns a tensor's bytes without a copy, `read` a float32 copy.
    """

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
        """Return the stored bytes of a tensor without copying them."""
        info = self._infos[name]
        if info.file not in self._maps:
            with open(info.file, "rb") as file:
                self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._maps[info.file])[info.start : info.end]

    def read(self, name: str) -> Float32:
        """Return a float32 copy of a tensor with its stored shape.

        Raises:
            FishError: the tensor is not stored as F32, F16 or BF16.
        """
        info = self._infos[name]
        array = decode(self.raw(name), info.dtype, name).reshape(info.shape)
        self._release_pages(info)
        return array

    def _release_pages(self, info: TensorInfo) -> None:
        """Release the pages just read; otherwise, reading every tensor leaves the whole model in memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE  # neighbouring tensors share the pages at both ends
            if info.end - start >= mmap.PAGESIZE:
                self._maps[info.file].madvise(mmap.MADV_DONTNEED, start, info.end - start)

    @property
    def num_parameters(self) -> int:
        """Total number of stored elements."""
        return sum(int(np.prod(info.shape)) for info in self._infos.values())

    @property
    def dtype(self) -> str:
        """The dtype that occupies the most bytes, as a NumPy-style name such as `bfloat16`."""
        bytes_by_dtype: dict[str, int] = {}
        for info in self._infos.values():
            bytes_by_dtype[info.dtype] = bytes_by_dtype.get(info.dtype, 0) + info.end - info.start
        dominant = max(bytes_by_dtype, key=lambda dtype: bytes_by_dtype[dtype])
        return NAMES.get(dominant, dominant)


def decode(raw: memoryview | bytes, dtype: str, name: str = "tensor") -> Float32:
    """Decode stored little-endian bytes into a flat float32 array, always a copy.

    Args:
        dtype: the safetensors name of the stored dtype.
        name: the tensor's name, for error messages.

    Raises:
        FishError: `dtype` is not F32, F16 or BF16.
    """
    if dtype not in _NUMPY_TYPES:
        raise FishError(f"{name} is stored as {dtype}; F32, F16 or BF16 was expected.")
    return np.frombuffer(raw, _NUMPY_TYPES[dtype]).astype(np.float32)


def encode(array: Float32, dtype: str, name: str = "tensor") -> bytes:
    """Encode a float32 array as little-endian bytes in `dtype`, rounding to nearest even.

    Args:
        dtype: float32, float16 or bfloat16.
        name: the tensor's name, for error messages.

    Raises:
        FishError: a finite value overflows float16.
    """
    with np.errstate(over="ignore"):
        stored = array.astype(_NUMPY_TYPES[DTYPES[dtype][0]])
    if dtype == "float16" and np.isinf(stored).any() and not np.isinf(array).any():
        raise FishError(f"{name} has values beyond 65504, the largest in float16; use bfloat16 or float32.")
    return stored.tobytes()


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Read tensor infos, sorted by offset, and metadata from the header of one safetensors file.

    The safetensors library validates the file first.

    Raises:
        FishError: the file cannot be read or is not valid safetensors.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np"):
            pass  # opening validates the header: sizes, overlaps, gaps
        with open(path, "rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_size))
    except OSError as error:
        raise FishError(f"cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # the library raises its own SafetensorError, among others
        raise FishError(f"{path} is not a valid safetensors file ({error}); download it again.") from error
    metadata = header.pop("__metadata__", {})
    infos = []
    for name, entry in header.items():
        start, end = (8 + header_size + offset for offset in entry["data_offsets"])
        infos.append(TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, start, end))
    return sorted(infos, key=lambda info: info.start), metadata


def open_weights(folder: Path) -> Weights:
    """Open the weights of a Hugging Face or mlx-lm model folder, single-file or sharded.

    Raises:
        FishError: the folder has no safetensors files (pickles are never read), a shard is missing, or the
            index names a file outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise FishError(f"{index} has no `weight_map` from tensor names to file names; download it again.")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not is_path(name) or not name.endswith(".safetensors"):
                raise FishError(f"{index} names the file {name!r}; plain .safetensors names were expected.")
            if not (folder / name).is_file():
                raise FishError(f"{folder} lacks {name}, which its index lists; download it again.")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        contents = "only pickled weights, which can run code and are never read" if pickles else "no model*.safetensors"
        raise FishError(f"{folder} contains {contents}; a folder with safetensors files was expected.")
    return Weights([info for file in files for info in read_header(file)[0]])


def write_safetensors(path: Path, arrays: Mapping[str, Float32], metadata: dict[str, str] | None = None) -> None:
    """Write small float32 arrays (an adapter, optimizer moments) to one file, in the given order, atomically.

    Raises:
        FishError: an array contains NaN or an infinity, which is never written because it makes the file
            useless.
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise FishError(f"{name} is not finite; {path} was not written.")
    header = _encode_header([Slot(name, "F32", array.shape) for name, array in arrays.items()], metadata)
    write_bytes(path, header + b"".join(encode(array, "float32") for array in arrays.values()))


@dataclass(frozen=True)
class Slot:
    """Name, dtype and shape of a tensor to be written.

    Attributes:
        stored: the safetensors name of its dtype (F32, F16, BF16, U32).
    """

    name: str
    stored: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _WIDTHS[self.stored]


class ShardWriter:
    """Streaming writer for tensors whose names, shapes and order are known in advance.

    Writes `model.safetensors`, or numbered shards with an index if the tensors exceed `shard_bytes`. Holds
    only the chunk being written in memory.
    """

    def __init__(self, folder: Path, slots: Sequence[Slot], *, shard_bytes: int = SHARD_BYTES):
        self.folder = folder
        self.num_bytes = sum(slot.num_bytes for slot in slots)
        self._shards = _split_into_shards(slots, shard_bytes)
        self._queue = [(index, slot) for index, shard in enumerate(self._shards) for slot in shard]
        self._file: IO[bytes] | None = None
        self._num_written = 0
        self._open_shard = -1

    def put(self, chunks: Iterable[bytes | memoryview]) -> Slot:
        """Write the bytes of the next tensor and return its slot."""
        shard_index, slot = self._queue[self._num_written]
        self._num_written += 1
        if shard_index != self._open_shard:
            self._begin_shard(shard_index)
        assert self._file is not None
        written = sum(self._file.write(chunk) for chunk in chunks)
        assert written == slot.num_bytes, (slot, written)
        return slot

    def close(self) -> None:
        """Check that every tensor was written, close the file, and write the index of a sharded model."""
        assert self._num_written == len(self._queue), f"{len(self._queue) - self._num_written} tensors are missing"
        self.abandon()
        if len(self._shards) > 1:
            weight_map = {slot.name: self._shard_name(shard_index) for shard_index, slot in self._queue}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def abandon(self) -> None:
        """Close the current file, complete or not."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin_shard(self, index: int) -> None:
        self.abandon()
        self._open_shard = index
        self._file = open(self.folder / self._shard_name(index), "wb")  # noqa: SIM115 (closed by `abandon`)
        self._file.write(_encode_header(self._shards[index], {"format": "pt"}))

    def _shard_name(self, index: int) -> str:
        count = len(self._shards)
        return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Float32],
    *,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> int:
    """Stream tensors of one dtype into a folder with `ShardWriter`.

    Args:
        shapes: the shape of every tensor by name, in the order in which they are read and written.
        read: returns the float32 array for a name; at most one array is held at a time.
        dtype: the stored dtype: float32, float16 or bfloat16.
        progress: called after each tensor with the number of bytes written for it.

    Returns:
        The total size of the tensors in bytes.
    """
    slots = [Slot(name, DTYPES[dtype][0], shape) for name, shape in shapes.items()]
    writer = ShardWriter(folder, slots, shard_bytes=shard_bytes)
    try:
        for name, shape in shapes.items():
            array = read(name)
            assert array.shape == shape, (name, array.shape, shape)
            progress(writer.put(encoded_pieces(array, dtype, name)).num_bytes)
        writer.close()
    finally:
        writer.abandon()
    return writer.num_bytes


def encoded_pieces(array: Float32, dtype: str, name: str) -> Iterator[bytes]:
    """Yield the result of `encode` piece by piece, which bounds the memory of the cast."""
    flat = array.reshape(-1)
    for start in range(0, max(flat.size, 1), _PIECE):
        yield encode(flat[start : start + _PIECE], dtype, name)


def _split_into_shards(slots: Sequence[Slot], shard_bytes: int) -> list[list[Slot]]:
    """Split tensors, in order, into shards of at most `shard_bytes`; a larger tensor gets a shard of its own."""
    shards: list[list[Slot]] = [[]]
    num_bytes = 0
    for slot in slots:
        if shards[-1] and num_bytes + slot.num_bytes > shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(slot)
        num_bytes += slot.num_bytes
    return shards


def _encode_header(slots: Sequence[Slot], metadata: dict[str, str] | None) -> bytes:
    """Return the length-prefixed JSON header, padded to 8 bytes, for tensors stored back to back."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for slot in slots:
        end = offset + slot.num_bytes
        header[slot.name] = {"dtype": slot.stored, "shape": list(slot.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
