"""Quantise a model folder to 4 or 8 bits with MLX. Knows nothing of where the folder came from."""

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

_ROWS = 4096  # quantised at a time: bounds what MLX holds of an embedding


@dataclass(frozen=True)
class MlxQuantizer:
    """See `mlx_fish.models.convert.Quantizer`: 4 or 8 bits, `group_size` weights share a scale and a bias."""

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
    """Write the quantised weights of `source` into `target`, as mlx-lm stores them.

    Args:
        config: the model's config.json, with both rope forms (mlx-lm reads only the older one).
        dtype: the float type of scales, biases, norms and whatever else is not quantised.
        progress: called with the bytes of each tensor as it is ready.

    Returns:
        the config with `quantization` in it.

    Raises:
        FishError: mlx-lm does not know the architecture, or the weights do not fit the config.
    """
    try:
        model, _ = load_model(source, lazy=True, model_config=config)
    except (ValueError, KeyError, TypeError) as error:
        raise FishError(f"mlx-lm cannot load {source} ({error}); leave -q out.") from error
    is_kept = getattr(model, "cast_predicate", lambda path: True)
    float_type = getattr(mx, dtype)

    def cast(path: str, array: mx.array) -> mx.array:
        return array.astype(float_type) if is_kept(path) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(cast, model.parameters()))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line of its own
        model, quantized = quantize_model(model, config, group_size, bits)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one at a time, so that a float copy lives no longer than its own quantisation
        progress(array.nbytes)
    save_model(target, model)
    found: dict[str, Any] = quantized
    return found


def quantize_rows(
    array: Float32, *, group_size: int, bits: int, dtype: str
) -> tuple[npt.NDArray[np.uint32], Float32, Float32]:
    """One matrix (out, in) -> (packed (out, in * bits / 32), scales, biases (out, in / group_size)).

    The values are cast to `dtype` first, as mlx-lm does, so that scales and biases are exact in that type.
    """
    parts = []
    for start in range(0, array.shape[0], _ROWS):
        rows = mx.array(array[start : start + _ROWS]).astype(getattr(mx, dtype))
        packed, scales, biases = mx.quantize(rows, group_size=group_size, bits=bits)
        parts.append((np.array(packed), np.array(scales.astype(mx.float32)), np.array(biases.astype(mx.float32))))
    packed_parts, scale_parts, bias_parts = zip(*parts, strict=True)
    return np.concatenate(packed_parts), np.concatenate(scale_parts), np.concatenate(bias_parts)
