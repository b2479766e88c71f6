"""Activation checkpointing: store only each block's input and recompute the block in the backward pass.

See arXiv 1604.06174. A block's adapter tensors must be arguments of the recomputed function, since `mx.checkpoint`
treats captured arrays as constants and computes no gradient for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
import mlx.core as mx
import mlx.nn as nn

from mlx_fish.backends.mlx.lora import LoraLinear


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint the model's transformer blocks inside a `with` statement."""
    blocks = model.model.layers
    model.model.layers = [CheckpointedBlock(block) for block in blocks]
    try:
        yield
    finally:
        model.model.layers = blocks


class CheckpointedBlock(nn.Module):
    """A checkpointed transformer block. For training only: it does not support a key-value cache."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.use_sliding = getattr(block, "use_sliding", False)  # mlx-lm's llama model reads it from each block
        self._lora = [layer for _, layer in block.named_modules() if isinstance(layer, LoraLinear)]

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """(B, L, D) -> (B, L, D)."""
        assert cache is None

        counts = [len(layer.values) for layer in self._lora]

        def compute(x: mx.array, *tensors: mx.array) -> mx.array:
            rest = iter(tensors)
            for layer, count in zip(self._lora, counts, strict=True):
                if count:
                    layer.bind(islice(rest, count))
            return cast(mx.array, self.block(x, mask))

        return mx.checkpoint(compute)(x, *(value for layer in self._lora for value in layer.values))
