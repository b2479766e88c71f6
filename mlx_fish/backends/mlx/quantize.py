"""Quantise a model folder to 4 or 8 bits with MLX. Does not depend on how the folder was made."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_fish.backends.mlx.runtime as runtime  # isort: skip  # noqa: F401
import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import load_model, quantize_model, save_model

from mlx_fish.errors import FishError
from mlx_fish.storage.tensors import Float32

_ROWS = 4096  # rows quantised at a time, to limit the memory that MLX needs for an embedding


@dataclass(frozen=True)
class MlxQuantizer:
    """A quantizer to 4 or 8 bits, with one scale and one bias for each group of `group_size` weights.

    Implements `mlx_fish.models.convert.Quantizer`.
    """

    bits: int
    group_size: int

    def quantize_folder(
        self,
        source: Path,
        target: Path,
        *,
        config: dict[str, Any],
        dtype: str,
        progress: Callable[[int], None] = lambda num_bytes: None,
    ) -> dict[str, Any]:
        return quantize_folder(
            source, target, config=config, bits=self.bits, group_size=self.group_size, dtype=dtype, progress=progress
        )


def quantize_folder(
    source: Path,
    target: Path,
    *,
    config: dict[str, Any],
    bits: int,
    group_size: int,
    dtype: str,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> dict[str, Any]:
    """Quantise the weights of the folder `source` and write them to `target` in mlx-lm's format.

    Args:
        source, target: model folder to read, and folder to write.
        config: the model's config.json, with both forms of the RoPE settings (mlx-lm reads only the older one).
        bits: bits per weight, 4 or 8.
        group_size: number of weights that share a scale and a bias.
        dtype: float dtype of scales, biases, norms and all other tensors that are not quantised.
        progress: called with the bytes of each tensor after it is computed.

    Returns:
        the config with a `quantization` entry.

    Raises:
        FishError: mlx-lm does not support the architecture, or the weights do not match the config.
    """
    try:
        model, _ = load_model(source, lazy=True, model_config=config)
    except (ValueError, KeyError, TypeError) as error:
        raise FishError(f"mlx-lm cannot load {source} ({error}); convert it without -q.") from error
    is_cast = getattr(model, "cast_predicate", lambda path: True)
    float_type = getattr(mx, dtype)

    def cast(path: str, array: mx.array) -> mx.array:
        return array.astype(float_type) if is_cast(path) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(cast, model.parameters()))
    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
        model, quantized_config = quantize_model(model, config, group_size, bits)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one at a time, so that each float copy is freed as soon as it is quantised
        progress(array.nbytes)
    save_model(target, model)
    result: dict[str, Any] = quantized_config
    return result


def quantize_rows(
    array: Float32, *, group_size: int, bits: int, dtype: str
) -> tuple[npt.NDArray[np.uint32], Float32, Float32]:
    """Quantise one matrix (out, in).

    The values are cast to `dtype` first, as in mlx-lm, so that scales and biases are exact in that dtype.

    Returns:
        the packed weights (out, in * bits / 32), uint32, and scales and biases (out, in / group_size), float32.
    """
    parts = []
    for start in range(0, array.shape[0], _ROWS):
        rows = mx.array(array[start : start + _ROWS]).astype(getattr(mx, dtype))
        packed, scales, biases = mx.quantize(rows, group_size=group_size, bits=bits)
        parts.append((np.array(packed), np.array(scales.astype(mx.float32)), np.array(biases.astype(mx.float32))))
    packed_parts, scale_parts, bias_parts = zip(*parts, strict=True)
    return np.concatenate(packed_parts), np.concatenate(scale_parts), np.concatenate(bias_parts)
