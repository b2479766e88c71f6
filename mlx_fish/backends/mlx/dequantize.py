"""Expand a tensor that MLX quantised (affine: value = scale * q + bias for each group of inputs) to float32."""

import mlx_fish.backends.mlx.runtime as runtime  # isort: skip # noqa: F401
import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_fish.storage.tensors import Float32

_ROWS = 4096  # expanded at a time: an embedding would be held twice otherwise


def dequantize(
    weight: npt.NDArray[np.uint32], scales: Float32, biases: Float32, *, group_size: int, bits: int
) -> Float32:
    """The float32 values behind a packed weight.

    Scales and biases come as float32: with half-precision ones MLX would round each value to their type.

    Args:
        weight: (out, in * bits / 32).
        scales, biases: (out, in / group_size).

    Returns:
        (out, in) float32.
    """
    expanded = np.empty((weight.shape[0], scales.shape[1] * group_size), np.float32)
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        packed, scale, bias = mx.array(weight[rows]), mx.array(scales[rows]), mx.array(biases[rows])
        expanded[rows] = np.array(mx.dequantize(packed, scale, bias, group_size=group_size, bits=bits), copy=False)
    return expanded
