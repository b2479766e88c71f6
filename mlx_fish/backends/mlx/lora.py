"""LoRA layers in MLX, and the flat vector that holds every trainable number.

    x ──┬── W x (+ b), frozen, any precision ─────────┐
        └── dropout ── A x (r) ── B (A x) ── * scale ─┴── y        arXiv 2106.09685

A is (r, in) and B is (out, r), as PEFT stores them. The masters are one float32 vector, so that clipping and AdamW are a few
operations instead of a few for each of 336 matrices; the layers compute in the model's own dtype.
"""

from collections.abc import Sequence

import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fish.adapter import Arrays, LoraSpec, key_a, key_b


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank addition. `dropout_key` is set for a training step only."""

    def __init__(self, linear: nn.Module, *, scale: float, dropout: float):
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.dropout = dropout
        self.lora_a: mx.array | None = None
        self.lora_b: mx.array | None = None
        self.dropout_key: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """(..., in) -> (..., out)."""
        y = self.linear(x)
        if self.lora_a is None or self.lora_b is None:
            return y
        if self.dropout_key is not None:
            keep = mx.random.bernoulli(1 - self.dropout, x.shape, key=self.dropout_key)
            x = x * keep.astype(x.dtype) * (1 / (1 - self.dropout))
        low = x.reshape(-1, x.shape[-1]) @ self.lora_a.T
        return mx.addmm(y.reshape(-1, y.shape[-1]), low, self.lora_b.T, alpha=self.scale).reshape(y.shape)


class LoraLayers:
    """Every LoraLinear of a model, and the map between the flat vector and their matrices."""

    def __init__(self, model: nn.Module, spec: LoraSpec, dtype: mx.Dtype):
        self.spec = spec
        self.dtype = dtype
        self.layers: list[LoraLinear] = []
        self.keys: list[str] = []
        self.shapes: list[tuple[int, int]] = []
        for module, (out, inner) in spec.layers.items():
            parent, name = _parent(model, module)
            layer = LoraLinear(getattr(parent, name), scale=spec.scales[module], dropout=spec.dropout)
            setattr(parent, name, layer)
            self.layers.append(layer)
            self.keys += [key_a(module), key_b(module)]
            self.shapes += [(spec.ranks[module], inner), (out, spec.ranks[module])]
        self.sizes = [rows * columns for rows, columns in self.shapes]
        self._ends = np.cumsum(self.sizes)[:-1].tolist()

    def flatten(self, arrays: Arrays) -> mx.array:
        """PEFT's named matrices -> (P,) float32."""
        for key, shape in zip(self.keys, self.shapes, strict=True):
            assert arrays[key].shape == shape, (key, arrays[key].shape, shape)
        return mx.array(np.concatenate([arrays[key].reshape(-1) for key in self.keys]))

    def unflatten(self, flat: mx.array) -> Arrays:
        """(P,) float32 -> PEFT's named matrices."""
        pieces = np.split(np.array(flat), self._ends)
        return {key: piece.reshape(shape) for key, piece, shape in zip(self.keys, pieces, self.shapes, strict=True)}

    def split(self, flat: mx.array) -> list[mx.array]:
        """(P,) -> A and B of each layer in turn, inside a traced function."""
        pieces = mx.split(flat, self._ends)
        return [piece.reshape(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def bind(self, matrices: Sequence[mx.array], dropout_key: mx.array | None = None) -> None:
        """Let every layer compute with these matrices."""
        keys: list[mx.array | None] = [None] * len(self.layers)
        if dropout_key is not None and self.spec.dropout:
            keys = [*mx.random.split(dropout_key, len(self.layers))]
        for layer, a, b, key in zip(self.layers, matrices[::2], matrices[1::2], keys, strict=True):
            layer.lora_a, layer.lora_b, layer.dropout_key = a.astype(self.dtype), b.astype(self.dtype), key

    def unbind(self) -> None:
        """Let every layer compute the base alone."""
        for layer in self.layers:
            layer.lora_a = layer.lora_b = layer.dropout_key = None

    def remove(self, model: nn.Module) -> None:
        """Put the plain layers back."""
        for module, layer in zip(self.spec.layers, self.layers, strict=True):
            parent, name = _parent(model, module)
            setattr(parent, name, layer.linear)


def _parent(model: nn.Module, module: str) -> tuple[nn.Module, str]:
    """`model.layers.0.mlp.up_proj` -> (the mlp, `up_proj`)."""
    path, _, name = module.rpartition(".")
    parent = model
    for part in path.split("."):
        parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
    return parent, name
