"""Choose the stored type of each GGUF tensor, encode it, and decode it as a reader would.

The `gguf` package quantises most types; the optional package `libgguf` quantises Q4_K and Q6_K. The types of
a Q4_K_M file follow llama.cpp's policy (`llama_tensor_get_type` in src/llama-quant.cpp).
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlx_fish.errors import FishError
from mlx_fish.storage.tensors import Float32, decode, encode

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

# Name of the file type -> (llama.cpp's LlamaFileType, default ggml type of a matrix).
GGUF_TYPES = {
    "f32": ("ALL_F32", "F32"),
    "f16": ("MOSTLY_F16", "F16"),
    "bf16": ("MOSTLY_BF16", "BF16"),
    "q8_0": ("MOSTLY_Q8_0", "Q8_0"),
    "q4_0": ("MOSTLY_Q4_0", "Q4_0"),
    "q4_k_m": ("MOSTLY_Q4_K_M", "Q4_K"),
}
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FALLBACKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # for rows that are not a multiple of 256
_BY_LIBGGUF = ("Q4_K", "Q6_K")
_PIECE = 1 << 18  # elements encoded at a time, a multiple of every block size


def check_type(name: str) -> None:
    """Check, before any work, that a file type exists and its quantiser is installed.

    Raises:
        FishError: the type is unknown, or `libgguf` is not installed.
    """
    if name not in GGUF_TYPES:
        raise FishError(f"--to-gguf {name}: expected one of {', '.join(GGUF_TYPES)}.")
    if name == "q4_k_m":
        try:
            import libgguf  # noqa: F401
        except ImportError as error:
            raise FishError(
                "q4_k_m needs the package libgguf, which is not installed; run `pip install "
                "'mlx-fish[libgguf]'`, or use q8_0."
            ) from error


def tensor_type(name: str, shape: tuple[int, ...], *, file_type: str, num_blocks: int, tied: bool) -> str:
    """Return the ggml type of a tensor, chosen by its GGUF name and shape.

    Vectors stay float32. The output matrix, which computes the logits, gets at least 6 bits. In Q4_K_M so do
    attn_v and ffn_down in the first and last eighth of the blocks, and in every third block between them.
    """
    if len(shape) == 1 or file_type == "f32":
        return "F32"
    chosen = GGUF_TYPES[file_type][1]
    if chosen in _FLOATS:
        return chosen
    part = name.split(".")[-2]
    if part == "output" or (part == "token_embd" and tied):
        chosen = "Q8_0" if chosen == "Q8_0" else "Q6_K"
        if file_type == "q4_0":
            chosen = "Q8_0"  # llama.cpp uses Q6_K, which the gguf package cannot quantise
    elif file_type == "q4_k_m" and part in ("attn_v", "ffn_down") and _needs_more_bits(name, num_blocks):
        chosen = "Q6_K"
    if chosen in _FALLBACKS and shape[-1] % 256:
        chosen = _FALLBACKS[chosen]
    return chosen if shape[-1] % 32 == 0 else "F16"


def _needs_more_bits(name: str, num_blocks: int) -> bool:
    """Return whether llama.cpp's Q4_K_M policy gives 6 bits to attn_v and ffn_down of this tensor's block."""
    block, eighth = int(name.split(".")[1]), num_blocks // 8
    return block < eighth or block >= 7 * num_blocks // 8 or (block - eighth) % 3 == 2


def num_bytes(shape: tuple[int, ...], type_name: str) -> int:
    """Return the stored size of a tensor in bytes."""
    from gguf.constants import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[ggml_type(type_name)]
    return math.prod(shape) // int(block) * int(block_bytes)


def ggml_type(type_name: str) -> "GGMLQuantizationType":
    """Return the `gguf` package's constant for a type name such as `Q8_0`."""
    from gguf.constants import GGMLQuantizationType

    constant: GGMLQuantizationType = GGMLQuantizationType[type_name]
    return constant


def encoded(array: Float32, type_name: str, name: str) -> Iterator[bytes]:
    """Yield the stored bytes of a tensor, one piece at a time.

    Args:
        array: float32, any shape; its last dimension is a row.
        type_name: the ggml type.
        name: the tensor's name, for error messages.

    Raises:
        FishError: a value is too large for float16.
    """
    flat = array.reshape(-1)
    step = _PIECE if type_name not in _BY_LIBGGUF else _PIECE // array.shape[-1] * array.shape[-1] or array.shape[-1]
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        if type_name in _FLOATS:
            yield encode(piece, _FLOATS[type_name], name)
        else:
            yield _quantized(piece, type_name, array.shape[-1]).tobytes()


def as_read(array: Float32, type_name: str, name: str) -> Float32:
    """Return the values that a reader decodes: quantised and dequantised, float32, same shape."""
    if type_name == "F32":
        return array
    if type_name in _FLOATS:
        return decode(encode(array, _FLOATS[type_name], name), type_name).reshape(array.shape)
    from gguf.quants import dequantize

    packed = _quantized(np.ascontiguousarray(array).reshape(-1), type_name, array.shape[-1])
    dequantized: Float32 = dequantize(packed.reshape(1, -1), ggml_type(type_name))
    return dequantized.reshape(array.shape)


def _quantized(flat: Float32, type_name: str, columns: int) -> npt.NDArray[np.uint8]:
    """Quantise complete rows, flattened, and return the packed bytes, (num_bytes,)."""
    if type_name in _BY_LIBGGUF:
        quantize_rows: Any = _libgguf().quantize_rows
        return np.frombuffer(quantize_rows(flat.reshape(-1, columns), ggml_type(type_name)), np.uint8)
    from gguf.quants import quantize

    # Pass one long row: the package calls back into Python for every sixteen rows.
    return np.asarray(quantize(flat.reshape(1, -1), ggml_type(type_name)), np.uint8).reshape(-1)


def _libgguf() -> Any:
    import libgguf

    return libgguf
