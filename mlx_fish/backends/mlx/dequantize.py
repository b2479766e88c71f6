"""Dequantise weights that MLX packed, to float32 (affine: value = scale * q + bias in each group of inputs)."""

import mlx_fish.backends.mlx.runtime as runtime  # isort: skip # noqa: F401
import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_fish.storage.tensors import Float32

_ROWS = 4096  # rows dequantised at a time, so that memory never holds an embedding twice


def dequantize(
    weight: npt.NDArray[np.uint32], scales: Float32, biases: Float32, *, group_size: int, bits: int
) -> Float32:
    """Return the float32 values of a packed weight.

    Args:
        weight: (out, in * bits / 32), packed.
        scales, biases: (out, in / group_size), float32. With half-precision scales MLX would
            round each value to their dtype.
        group_size: number of weights in a group.
        bits: bits per weight.

    Returns:
        (out, in) float32.
    """
    expanded = np.empty((weight.shape[0], scales.shape[1] * group_size), np.float32)
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        packed, scale, bias = mx.array(weight[rows]), mx.array(scales[rows]), mx.array(biases[rows])
        expanded[rows] = np.array(mx.dequantize(packed, scale, bias, group_size=group_size, bits=bits), copy=False)
    return expanded
