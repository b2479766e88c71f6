"""A GGUF file as data: its metadata, and its tensors expanded one at a time. Knows nothing of models.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The header is
parsed here: every count and length in it is checked against the file's size before it is believed, which the `gguf`
package does not do (and it takes seconds to read a vocabulary of 150,000 tokens). The block formats are that package's.
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
_PIECE = 1 << 16  # elements expanded at a time, a multiple of every block: its temporaries fit the cache


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in NumPy's order, rows first; `start` and `end` are byte offsets in the file."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * (self.end - self.start) / max(1, int(np.prod(self.shape, dtype=np.int64)))


class GgufFile:
    """An open GGUF file.

    Attributes:
        metadata: key -> int, float, bool, str or a list of these.
        tensors: name -> `GgufTensor`, in file order.

    Raises:
        FishError: the file is not GGUF, is damaged, or holds a tensor type that cannot be expanded.
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
            self.metadata, self.tensors = _parse(self._data)
        except _DamagedError as error:
            raise FishError(f"{path} is not a usable GGUF file ({error}); fetch it again.") from error
        for type_name in sorted({tensor.type_name for tensor in self.tensors.values()}):
            if not _can_expand(type_name):
                raise FishError(
                    f"{path} holds {type_name} tensors, which cannot be expanded; use a GGUF of another type."
                )

    def read(self, name: str, *, rows: int | None = None) -> Float32:
        """The tensor (its first `rows` rows, when given) expanded to float32, always a copy."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        shape = tensor.shape if rows is None else (min(rows, tensor.shape[0]), *tensor.shape[1:])
        ggml_type = GGMLQuantizationType[tensor.type_name]
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        result = np.empty(int(np.prod(shape, dtype=np.int64)), np.float32)
        raw = np.frombuffer(self._data, np.uint8, result.size // block * block_bytes, tensor.start)
        for start in range(0, result.size, _PIECE):
            piece = raw[start // block * block_bytes : (start + _PIECE) // block * block_bytes]
            # As one row: `dequantize` calls back into Python for every sixteen of them.
            result[start : start + _PIECE] = dequantize(piece.reshape(1, -1), ggml_type)[0]
        return result.reshape(shape)


class _DamagedError(Exception):
    """What in the header does not hold together."""


class _Cursor:
    """Reads values one after another and never past the end."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise _DamagedError("it ends in the middle of its header")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, smallest: int) -> int:
        """A number of things of at least `smallest` bytes each, which must fit in what is left of the file."""
        value: int = self.scalar("Q")
        if value * smallest > len(self.data) - self.at:
            raise _DamagedError(f"it claims {value} entries where there is no room for them")
        return value

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _DamagedError("a text in its header is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _DamagedError(f"a metadata value has the unknown type {kind}")
        item = self.scalar("I")
        if item in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[item])
            count = self.count(width)
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * width)))
        if item != _STRING:
            raise _DamagedError(f"a metadata array has items of type {item}")
        return [self.string() for _ in range(self.count(8))]


def _parse(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    cursor = _Cursor(data)
    if data[:4] != b"GGUF":
        raise _DamagedError("it does not begin with GGUF")
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise _DamagedError(f"version {version}; little-endian version 2 or 3 was expected")
    num_tensors = cursor.count(24)
    num_keys = cursor.count(13)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise _DamagedError(f"{key} stands there twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _DamagedError(f"alignment {alignment}; a power of two was expected")
    first = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise _DamagedError(f"the tensor {name} stands there twice")
        tensors[name] = _place(name, shape, kind, first + offset, len(data))
    return metadata, tensors


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dimensions = cursor.scalar("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise _DamagedError(f"the tensor {name} has {num_dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(num_dimensions))[::-1]  # GGUF names the columns first
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _place(name: str, shape: tuple[int, ...], kind: int, start: int, file_size: int) -> GgufTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        ggml_type = GGMLQuantizationType(kind)
    except ValueError as error:
        raise _DamagedError(f"the tensor {name} has the unknown type {kind}") from error
    block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if shape[-1] % block:
        raise _DamagedError(f"the rows of {name} are no whole blocks of {ggml_type.name}")
    size = block_bytes
    for extent in (*shape[:-1], shape[-1] // block):  # Python's integers, which do not overflow
        size *= extent
    if start + size > file_size:
        raise _DamagedError(f"it ends before the tensor {name}")
    return GgufTensor(name, ggml_type.name, shape, start, start + size)


def _can_expand(type_name: str) -> bool:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    ggml_type = GGMLQuantizationType[type_name]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[ggml_type][1]), np.uint8), ggml_type)
    except NotImplementedError:
        return False
    return True
