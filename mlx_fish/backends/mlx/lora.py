"""LoRA layers in MLX, and the flat vector of all trainable parameters.

    x ──┬── W x (+ b), frozen, any precision ─────────┐
        └── dropout ── A x (r) ── B (A x) ── * scale ─┴── y        arXiv 2106.09685

A is (r, in) and B is (out, r), as PEFT stores them. The master weights are one float32 vector, so that clipping and
AdamW are a few operations in total instead of a few for each of 336 matrices. The layers compute in the model's dtype.
"""

from collections.abc import Iterable, Sequence

import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fish.adapters.spec import AdapterSpec, Arrays, FlatLayout


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank update. Computes only W x (+ b) until `bind` sets A and B."""

    def __init__(self, linear: nn.Module, *, scale: float, dropout: float):
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.dropout = dropout
        self.lora_a: mx.array | None = None
        self.lora_b: mx.array | None = None
        self.dropout_key: mx.array | None = None

    @property
    def values(self) -> list[mx.array]:
        """Return [A, B], or an empty list if none are bound."""
        return [] if self.lora_a is None or self.lora_b is None else [self.lora_a, self.lora_b]

    def bind(self, values: Iterable[mx.array]) -> None:
        """Set A (r, in) and B (out, r)."""
        self.lora_a, self.lora_b = values

    def unbind(self) -> None:
        """Remove A, B and the dropout key."""
        self.lora_a = self.lora_b = self.dropout_key = None

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
    """Every LoraLinear of a model, and the map between the flat vector and their tensors."""

    def __init__(self, model: nn.Module, spec: AdapterSpec, dtype: mx.Dtype):
        self.spec = spec
        self.dtype = dtype
        self.layout = FlatLayout(spec)
        self.layers: list[LoraLinear] = []
        for module, layer_spec in spec.layers.items():
            parent, name = _parent(model, module)
            layer = LoraLinear(getattr(parent, name), scale=layer_spec.scale, dropout=spec.dropout)
            setattr(parent, name, layer)
            self.layers.append(layer)

    def flatten(self, arrays: Arrays) -> mx.array:
        """Return the tensors under PEFT's keys as one vector (P,), float32."""
        return mx.array(self.layout.flatten(arrays))

    def unflatten(self, flat: mx.array) -> Arrays:
        """Return the parts of a vector (P,), float32, as NumPy arrays under PEFT's keys."""
        return self.layout.unflatten(np.array(flat))

    def split(self, flat: mx.array) -> list[mx.array]:
        """Split a vector (P,) into the tensors of all layers, in order. Usable inside a traced function."""
        pieces = mx.split(flat, self.layout.ends)
        return [piece.reshape(shape) for piece, shape in zip(pieces, self.layout.shapes, strict=True)]

    def bind(self, tensors: Sequence[mx.array], dropout_key: mx.array | None = None) -> None:
        """Set the A and B of every layer, cast to the model's dtype.

        Args:
            tensors: the result of `split`.
            dropout_key: random key of the dropout masks; None: no dropout.
        """
        keys: list[mx.array | None] = [None] * len(self.layers)
        if dropout_key is not None and self.spec.dropout:
            keys = [*mx.random.split(dropout_key, len(self.layers))]
        for layer, values, key in zip(self.layers, self.layout.by_layer(tensors), keys, strict=True):
            layer.bind(value.astype(self.dtype) for value in values)
            layer.dropout_key = key

    def unbind(self) -> None:
        """Remove the tensors of every layer, so that the model computes the base."""
        for layer in self.layers:
            layer.unbind()

    def remove(self, model: nn.Module) -> None:
        """Replace the LoRA layers by the original linear layers."""
        for module, layer in zip(self.spec.layers, self.layers, strict=True):
            parent, name = _parent(model, module)
            setattr(parent, name, layer.linear)


def _parent(model: nn.Module, module: str) -> tuple[nn.Module, str]:
    """Return a module's parent and its name there: `model.layers.0.mlp.up_proj` -> (the mlp, `up_proj`)."""
    path, _, name = module.rpartition(".")
    parent = model
    for key in path.split("."):
        parent = parent[int(key)] if key.isdigit() else getattr(parent, key)
    return parent, name
