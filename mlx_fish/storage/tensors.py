"""Safetensors files <-> NumPy, one tensor at a time, bfloat16 included (by `ml_dtypes`).

The format: https://huggingface.co/docs/safetensors. Knows nothing of models or adapters.
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
        array = decode(self.raw(name), info.dtype, name).reshape(info.shape)
        self._release(info)
        return array

    def _release(self, info: TensorInfo) -> None:
        """Give the pages just read back: a model read through would otherwise end up in memory whole."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE  # the pages at both ends belong to neighbours too
            if info.end - start >= mmap.PAGESIZE:
                self._maps[info.file].madvise(mmap.MADV_DONTNEED, start, info.end - start)

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
    """Stored little-endian bytes -> flat float32 array, always a copy. `dtype` is safetensors' name."""
    if dtype not in _NUMPY_TYPES:
        raise FishError(f"{name} is stored as {dtype}; F32, F16 or BF16 was expected.")
    return np.frombuffer(raw, _NUMPY_TYPES[dtype]).astype(np.float32)


def encode(array: Float32, dtype: str, name: str = "tensor") -> bytes:
    """Float32 -> stored bytes in `dtype` (float32, float16, bfloat16), rounded to nearest even.

    Raises:
        FishError: a finite value is too large for float16.
    """
    with np.errstate(over="ignore"):
        stored = array.astype(_NUMPY_TYPES[DTYPES[dtype][0]])
    if dtype == "float16" and np.isinf(stored).any() and not np.isinf(array).any():
        raise FishError(f"{name} has values beyond float16's 65504; use bfloat16 or float32.")
    return stored.tobytes()


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
    header = _header([Slot(name, "F32", array.shape) for name, array in arrays.items()], metadata)
    write_bytes(path, header + b"".join(encode(array, "float32") for array in arrays.values()))


@dataclass(frozen=True)
class Slot:
    """A tensor to be written: `stored` is safetensors' name of its type (F32, F16, BF16, U32)."""

    name: str
    stored: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _WIDTHS[self.stored]


class ShardWriter:
    """Tensors in an order known beforehand, one after another, into `model.safetensors`, or into numbered shards with an
    index above `shard_bytes`. Only the bytes at hand are held."""

    def __init__(self, folder: Path, slots: Sequence[Slot], *, shard_bytes: int = SHARD_BYTES):
        self.folder = folder
        self.num_bytes = sum(slot.num_bytes for slot in slots)
        self._shards = _cut(slots, shard_bytes)
        self._waiting = [(number, slot) for number, shard in enumerate(self._shards) for slot in shard]
        self._file: IO[bytes] | None = None
        self._next = 0
        self._open = -1

    def put(self, chunks: Iterable[bytes | memoryview]) -> Slot:
        """Write the next tensor's bytes."""
        number, slot = self._waiting[self._next]
        self._next += 1
        if number != self._open:
            self._begin(number)
        assert self._file is not None
        written = sum(self._file.write(chunk) for chunk in chunks)
        assert written == slot.num_bytes, (slot, written)
        return slot

    def close(self) -> None:
        """Every tensor is there: write the index, when there is more than one file."""
        assert self._next == len(self._waiting), f"{len(self._waiting) - self._next} tensors are missing"
        self.abandon()
        if len(self._shards) > 1:
            weight_map = {slot.name: self._name(number) for number, slot in self._waiting}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def abandon(self) -> None:
        """Let the file go, whatever state it is in."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self, number: int) -> None:
        self.abandon()
        self._open = number
        self._file = open(self.folder / self._name(number), "wb")  # noqa: SIM115 (closed by `abandon`)
        self._file.write(_header(self._shards[number], {"format": "pt"}))

    def _name(self, number: int) -> str:
        count = len(self._shards)
        return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Float32],
    *,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> int:
    """Stream tensors of one type into a folder, see `ShardWriter`.

    Args:
        shapes: every tensor and its shape, in the order in which `read` will be asked for them.
        read: name -> float32 array of that shape; at most one is held.
        dtype: the stored type of them all.
        progress: called with the bytes written after each tensor.

    Returns:
        the bytes of all tensors together.
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
    """`encode`, a piece at a time: bounds the memory of what is cast."""
    flat = array.reshape(-1)
    for start in range(0, max(flat.size, 1), _PIECE):
        yield encode(flat[start : start + _PIECE], dtype, name)


def _cut(slots: Sequence[Slot], shard_bytes: int) -> list[list[Slot]]:
    shards: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if shards[-1] and filled + slot.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(slot)
        filled += slot.num_bytes
    return shards


def _header(slots: Sequence[Slot], metadata: dict[str, str] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for slot in slots:
        end = offset + slot.num_bytes
        header[slot.name] = {"dtype": slot.stored, "shape": list(slot.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
