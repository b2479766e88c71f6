"""Read a GGUF file: its metadata, and its tensors dequantised one at a time. Independent of model architectures.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The header
is parsed here because the `gguf` package does not check counts and lengths against the file size before using
them, and needs seconds to read a vocabulary of 150,000 tokens. Tensor blocks are dequantised by that package.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fish.errors import FishError
from mlx_fish.storage.tensors import Float32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
# Elements dequantised at a time, a multiple of every block size. The temporary arrays fit into the CPU cache.
_PIECE = 1 << 16


@dataclass(frozen=True)
class GgufTensor:
    """Name, type, shape and location of a tensor in a GGUF file.

    Attributes:
        type_name: the GGML type, such as `Q4_0`.
        shape: dimensions in NumPy's order, rows first.
        start, end: byte offsets in the file.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bits_per_weight(self) -> float:
        """Average number of bits per element, including the scales of a block."""
        return 8 * (self.end - self.start) / max(1, int(np.prod(self.shape, dtype=np.int64)))


class GgufFile:
    """An open, memory-mapped GGUF file.

    Attributes:
        metadata: key -> int, float, bool, str or a list of these.
        tensors: name -> `GgufTensor`, in file order.

    Raises:
        FishError: the file is not GGUF, is damaged, or has a tensor type that cannot be dequantised.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FishError(f"cannot read {path}: {error.strerror or error}.") from error
        except ValueError as error:  # an empty file cannot be mapped
            raise FishError(f"{path} is empty; a GGUF file was expected.") from error
        try:
            self.metadata, self.tensors = _parse_header(self._data)
        except _DamagedError as error:
            raise FishError(f"{path} is not a valid GGUF file ({error}); download it again.") from error
        for type_name in sorted({tensor.type_name for tensor in self.tensors.values()}):
            if not _can_dequantize(type_name):
                raise FishError(
                    f"{path} contains {type_name} tensors, which cannot be dequantised; "
                    "use a GGUF file of another type."
                )

    def read(self, name: str, *, rows: int | None = None) -> Float32:
        """Return a tensor, or its first `rows` rows, dequantised to float32; always a copy."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        shape = tensor.shape if rows is None else (min(rows, tensor.shape[0]), *tensor.shape[1:])
        ggml_type = GGMLQuantizationType[tensor.type_name]
        block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
        values = np.empty(int(np.prod(shape, dtype=np.int64)), np.float32)
        raw = np.frombuffer(self._data, np.uint8, values.size // block_size * block_bytes, tensor.start)
        for start in range(0, values.size, _PIECE):
            piece = raw[start // block_size * block_bytes : (start + _PIECE) // block_size * block_bytes]
            # Passed as one row, because `dequantize` calls back into Python once per sixteen rows.
            values[start : start + _PIECE] = dequantize(piece.reshape(1, -1), ggml_type)[0]
        return values.reshape(shape)


class _DamagedError(Exception):
    """The header is inconsistent."""


class _Cursor:
    """Reads consecutive values from a buffer, with bounds checks."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.offset = 0

    def read_bytes(self, size: int) -> bytes:
        if size > len(self.data) - self.offset:
            raise _DamagedError("it ends in the middle of its header")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def read_scalar(self, code: str) -> Any:
        """Read one little-endian value with a format code of `struct`."""
        return struct.unpack("<" + code, self.read_bytes(struct.calcsize("<" + code)))[0]

    def read_count(self, min_bytes: int) -> int:
        """Read a number of entries, and check that the rest of the file has `min_bytes` for each of them."""
        count: int = self.read_scalar("Q")
        if count * min_bytes > len(self.data) - self.offset:
            raise _DamagedError(f"its header claims {count} entries, more than fit into the file")
        return count

    def read_string(self) -> str:
        try:
            return self.read_bytes(self.read_scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _DamagedError("a string in its header is not UTF-8") from error

    def read_value(self, value_type: int) -> Any:
        """Read a metadata value of the given GGUF type: a scalar, a string or an array of these."""
        if value_type in _SCALARS:
            return self.read_scalar(_SCALARS[value_type])
        if value_type == _STRING:
            return self.read_string()
        if value_type != _ARRAY:
            raise _DamagedError(f"a metadata value has the unknown type {value_type}")
        item_type = self.read_scalar("I")
        if item_type in _SCALARS:
            item_bytes = struct.calcsize("<" + _SCALARS[item_type])
            count = self.read_count(item_bytes)
            return list(struct.unpack(f"<{count}{_SCALARS[item_type]}", self.read_bytes(count * item_bytes)))
        if item_type != _STRING:
            raise _DamagedError(f"a metadata array has items of the unsupported type {item_type}")
        return [self.read_string() for _ in range(self.read_count(8))]


def _parse_header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Return the metadata and the tensors of a GGUF file, validated against its size."""
    cursor = _Cursor(data)
    if data[:4] != b"GGUF":
        raise _DamagedError("it does not begin with GGUF")
    cursor.offset = 4
    version = cursor.read_scalar("I")
    if version not in (2, 3):
        raise _DamagedError(f"version {version}; little-endian version 2 or 3 was expected")
    num_tensors = cursor.read_count(24)
    num_keys = cursor.read_count(13)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.read_string()
        if key in metadata:
            raise _DamagedError(f"the metadata key {key} appears twice")
        metadata[key] = cursor.read_value(cursor.read_scalar("I"))
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _DamagedError(f"alignment {alignment}; a power of two was expected")
    data_start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, type_id, offset in infos:
        if name in tensors:
            raise _DamagedError(f"the tensor {name} appears twice")
        tensors[name] = _locate_tensor(name, shape, type_id, data_start + offset, len(data))
    return metadata, tensors


def _read_tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Read the (name, shape, GGML type id, offset in the data section) of a tensor."""
    name = cursor.read_string()
    num_dimensions = cursor.read_scalar("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise _DamagedError(f"the tensor {name} has {num_dimensions} dimensions")
    shape = tuple(cursor.read_scalar("Q") for _ in range(num_dimensions))[::-1]  # GGUF stores the columns first
    return name, shape, cursor.read_scalar("I"), cursor.read_scalar("Q")


def _locate_tensor(name: str, shape: tuple[int, ...], type_id: int, start: int, file_size: int) -> GgufTensor:
    """Return the tensor with its byte range, checked against the file size."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        ggml_type = GGMLQuantizationType(type_id)
    except ValueError as error:
        raise _DamagedError(f"the tensor {name} has the unknown type {type_id}") from error
    block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if shape[-1] % block_size:
        raise _DamagedError(f"the row length of {name} is not a multiple of the {ggml_type.name} block size")
    num_bytes = block_bytes
    for extent in (*shape[:-1], shape[-1] // block_size):  # Python integers, which do not overflow
        num_bytes *= extent
    if start + num_bytes > file_size:
        raise _DamagedError(f"it ends before the end of the tensor {name}")
    return GgufTensor(name, ggml_type.name, shape, start, start + num_bytes)


def _can_dequantize(type_name: str) -> bool:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    ggml_type = GGMLQuantizationType[type_name]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[ggml_type][1]), np.uint8), ggml_type)
    except NotImplementedError:
        return False
    return True
