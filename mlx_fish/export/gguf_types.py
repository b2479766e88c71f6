"""How a tensor lies in a GGUF file: which type it gets, its bytes, and what a reader will find in them.

The block formats are those of the `gguf` package; Q4_K and Q6_K are quantised by `libgguf`, an optional package. Which
tensor of a Q4_K_M file gets which type is llama.cpp's policy (`llama_tensor_get_type` in src/llama-quant.cpp).
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

# Our name -> (llama.cpp's LlamaFileType, the type of a matrix unless the policy says otherwise).
GGUF_TYPES = {
    "f32": ("ALL_F32", "F32"),
    "f16": ("MOSTLY_F16", "F16"),
    "bf16": ("MOSTLY_BF16", "BF16"),
    "q8_0": ("MOSTLY_Q8_0", "Q8_0"),
    "q4_0": ("MOSTLY_Q4_0", "Q4_0"),
    "q4_k_m": ("MOSTLY_Q4_K_M", "Q4_K"),
}
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FALLBACKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # for rows that are no whole blocks of 256
_BY_LIBGGUF = ("Q4_K", "Q6_K")
_PIECE = 1 << 18  # elements at a time, a multiple of every block


def check_type(name: str) -> None:
    """Refuse an unknown type, or one whose quantiser is not installed, before any work."""
    if name not in GGUF_TYPES:
        raise FishError(f"--to-gguf {name}: expected one of {', '.join(GGUF_TYPES)}.")
    if name == "q4_k_m":
        try:
            import libgguf  # noqa: F401
        except ImportError as error:
            raise FishError(
                "q4_k_m is quantised by the package libgguf, which is not installed; run `pip install "
                "'mlx-fish[libgguf]'`, or use q8_0."
            ) from error


def tensor_type(name: str, shape: tuple[int, ...], *, file_type: str, num_blocks: int, tied: bool) -> str:
    """The ggml type of a tensor, by its GGUF name.

    Vectors stay float32. The matrix that makes the logits gets 6 bits at least, and in Q4_K_M so do v and ffn_down of the
    first and the last eighth of the blocks and of every third between.
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
            chosen = "Q8_0"  # llama.cpp takes Q6_K, which the gguf package cannot make
    elif file_type == "q4_k_m" and part in ("attn_v", "ffn_down") and _wants_more_bits(name, num_blocks):
        chosen = "Q6_K"
    if chosen in _FALLBACKS and shape[-1] % 256:
        chosen = _FALLBACKS[chosen]
    return chosen if shape[-1] % 32 == 0 else "F16"


def _wants_more_bits(name: str, num_blocks: int) -> bool:
    block, eighth = int(name.split(".")[1]), num_blocks // 8
    return block < eighth or block >= 7 * num_blocks // 8 or (block - eighth) % 3 == 2


def num_bytes(shape: tuple[int, ...], type_name: str) -> int:
    from gguf.constants import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[ggml_type(type_name)]
    return math.prod(shape) // int(block) * int(block_bytes)


def ggml_type(type_name: str) -> "GGMLQuantizationType":
    from gguf.constants import GGMLQuantizationType

    found: GGMLQuantizationType = GGMLQuantizationType[type_name]
    return found


def encoded(array: Float32, type_name: str, name: str) -> Iterator[bytes]:
    """The stored bytes, a piece at a time. Raises FishError for a value too large for float16."""
    flat = array.reshape(-1)
    step = _PIECE if type_name not in _BY_LIBGGUF else _PIECE // array.shape[-1] * array.shape[-1] or array.shape[-1]
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        if type_name in _FLOATS:
            yield encode(piece, _FLOATS[type_name], name)
        else:
            yield _quantized(piece, type_name, array.shape[-1]).tobytes()


def as_read(array: Float32, type_name: str, name: str) -> Float32:
    """The values that a reader finds: quantised and expanded again. The same shape."""
    if type_name == "F32":
        return array
    if type_name in _FLOATS:
        return decode(encode(array, _FLOATS[type_name], name), type_name).reshape(array.shape)
    from gguf.quants import dequantize

    packed = _quantized(np.ascontiguousarray(array).reshape(-1), type_name, array.shape[-1])
    expanded: Float32 = dequantize(packed.reshape(1, -1), ggml_type(type_name))
    return expanded.reshape(array.shape)


def _quantized(flat: Float32, type_name: str, columns: int) -> npt.NDArray[np.uint8]:
    """Whole rows, flat -> packed bytes."""
    if type_name in _BY_LIBGGUF:
        quantize_rows: Any = _libgguf().quantize_rows
        return np.frombuffer(quantize_rows(flat.reshape(-1, columns), ggml_type(type_name)), np.uint8)
    from gguf.quants import quantize

    # As one row: the package calls back into Python for every sixteen of them.
    return np.asarray(quantize(flat.reshape(1, -1), ggml_type(type_name)), np.uint8).reshape(-1)


def _libgguf() -> Any:
    import libgguf

    return libgguf
