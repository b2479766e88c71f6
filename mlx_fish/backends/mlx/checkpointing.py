"""Activation checkpointing: a block keeps its input alone and computes itself again in the backward pass (arXiv 1604.06174).

A block's LoRA matrices must be arguments of what is recomputed: an array that a function merely captures counts as a constant.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
import mlx.core as mx
import mlx.nn as nn

from mlx_fish.backends.mlx.lora import LoraLinear


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Within the block of a `with`, the transformer blocks that hold LoRA layers are computed twice."""
    blocks = model.model.layers
    model.model.layers = [CheckpointedBlock(block) for block in blocks]
    try:
        yield
    finally:
        model.model.layers = blocks


class CheckpointedBlock(nn.Module):
    """A transformer block without a cache, as training calls it."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.use_sliding = getattr(block, "use_sliding", False)  # mlx-lm's llama asks its blocks
        self._lora = [layer for _, layer in block.named_modules() if isinstance(layer, LoraLinear)]

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """(B, L, D) -> (B, L, D)."""
        assert cache is None

        def compute(x: mx.array, *matrices: mx.array) -> mx.array:
            for layer, a, b in zip(self._lora, matrices[::2], matrices[1::2], strict=True):
                layer.lora_a, layer.lora_b = a, b
            return cast(mx.array, self.block(x, mask))

        matrices = [matrix for layer in self._lora for matrix in (layer.lora_a, layer.lora_b) if matrix is not None]
        return mx.checkpoint(compute)(x, *matrices)
