"""SwiGLU with a custom backward pass, and an exponential and a row sum chosen by device.

SwiGLU (arXiv 2002.05202) is silu(gate) * up. The backward pass recomputes the sigmoid from `gate`, so that a layer
stores two arrays of the MLP's width for it instead of three.
"""

from typing import cast

import mlx_fish.backends.mlx.runtime as runtime  # isort: skip
import mlx.core as mx
import mlx.nn as nn


def exp(x: mx.array) -> mx.array:
    """Return e^x, elementwise.

    In MLX's CPU build `power` is three times as fast as `exp` and as accurate; Metal has a fast `exp`.
    """
    return mx.exp(x) if runtime.on_gpu else mx.power(_E, x)


_E = 2.718281828459045


def row_sums(x: mx.array) -> mx.array:
    """Return the sums of the rows: (N, V) -> (N, 1).

    MLX's CPU build adds the terms of a row one by one, so that small terms are lost once the sum is large. A matrix
    product with ones adds in blocks and uses all cores. A GPU's sum adds in blocks anyway, while its matrix product
    may round the factors.
    """
    return x.sum(axis=-1, keepdims=True) if runtime.on_gpu else x @ mx.ones((x.shape[-1], 1), x.dtype)


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up. Arguments and result have the same shape and dtype."""
    return gate / (1 + exp(-gate)) * up


@swiglu.vjp
def _swiglu_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    # Without this dependency, mx.compile reuses the sigmoid of the forward pass and keeps it in memory until here.
    gate = cast(mx.array, mx.depends(gate, cotangent))
    sigmoid = 1 / (1 + exp(-gate))
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


class SwiGluMlp(nn.Module):
    """The MLP of a qwen2 or llama block, with the projections of the mlx-lm module that it replaces."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def __call__(self, x: mx.array) -> mx.array:
        """(..., D) -> (..., D)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
