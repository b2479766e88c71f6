"""SwiGLU with a backward of its own, and an exponential and a sum that suit this machine.

SwiGLU (arXiv 2002.05202) is silu(gate) * up. Its backward recomputes the sigmoid from `gate`, so that a layer keeps two wide
arrays for the backward pass, not three.
"""

from typing import cast

import mlx_fish.backends.mlx.runtime as runtime  # isort: skip
import mlx.core as mx
import mlx.nn as nn


def exp(x: mx.array) -> mx.array:
    """e^x, elementwise. MLX's CPU build computes `power` three times as fast as `exp`, as exactly; Metal has a fast `exp`."""
    return mx.exp(x) if runtime.on_gpu else mx.power(_E, x)


_E = 2.718281828459045


def row_sums(x: mx.array) -> mx.array:
    """(N, V) -> (N, 1). MLX's CPU build adds a row up one by one, and a large sum swallows the small numbers that follow it; a
    product with ones adds in blocks, on all cores. A GPU adds in blocks anyway, and may round a product's factors."""
    return x.sum(axis=-1, keepdims=True) if runtime.on_gpu else x @ mx.ones((x.shape[-1], 1), x.dtype)


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, all of one shape and dtype."""
    return gate / (1 + exp(-gate)) * up


@swiglu.vjp
def _swiglu_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    # Without this, mx.compile sees the forward's sigmoid again and keeps it for the backward pass after all.
    gate = cast(mx.array, mx.depends(gate, cotangent))
    sigmoid = 1 / (1 + exp(-gate))
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


class SwiGluMlp(nn.Module):
    """The feed-forward layer of a qwen2 or llama block, with the projections of the one that it replaces."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def __call__(self, x: mx.array) -> mx.array:
        """(..., D) -> (..., D)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
