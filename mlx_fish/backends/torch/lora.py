"""PEFT's LoRA layers on a transformers model, and the flat vector that holds every trainable number.

PEFT makes the layers, and `products.py` computes them. The masters are one float32 vector, as in `backends/mlx/lora.py`, so
that clipping and AdamW are a few operations instead of a few for each of 336 matrices. PEFT's matrices are views: of the
masters themselves in float32, else of a copy in the model's dtype that `refresh` brings up to date.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn as nn
from peft import LoraConfig, LoraModel

from mlx_fish.adapter import Arrays, LoraSpec, key_a, key_b
from mlx_fish.backends.torch.products import ADAPTER, LoraLinear


class KeyedDropout(nn.Module):
    """Dropout drawn from one generator of our own, seeded for each micro-batch; nothing global is drawn from or changed."""

    def __init__(self, share: float, generator: torch.Generator):
        super().__init__()
        self.share = share
        self.generator = generator
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., in)."""
        if not self.training:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.share, generator=self.generator)
        return x * keep / (1 - self.share)


class LoraLayers:
    """The LoRA layers of a model, and the map between the flat vector and their matrices.

    Attributes:
        master: (P,) float32, what the optimizer moves.
        matrices: A and B of each layer in turn, in the model's dtype: what the layers compute with.
    """

    def __init__(self, model: nn.Module, spec: LoraSpec, arrays: Arrays):
        self.model = model
        self.spec = spec
        self.keys = [key for module in spec.layers for key in (key_a(module), key_b(module))]
        self._shapes = [
            shape
            for module, (out, inner) in spec.layers.items()
            for shape in ((spec.ranks[module], inner), (out, spec.ranks[module]))
        ]
        self._sizes = [rows * columns for rows, columns in self._shapes]
        weight = next(model.parameters())
        self.master = nn.Parameter(self.flatten(arrays).to(weight.device))
        self._computed = self.master.detach().to(weight.dtype)  # the same memory when that is float32
        self.matrices = [nn.Parameter(view) for view in self._views(self._computed)]
        self._generator = torch.Generator(device=weight.device)
        self._dropouts: list[KeyedDropout] = []
        self._tuner = self._inject()

    def flatten(self, arrays: Arrays) -> torch.Tensor:
        """PEFT's named matrices -> (P,) float32 on the CPU."""
        for key, shape in zip(self.keys, self._shapes, strict=True):
            assert arrays[key].shape == shape, (key, arrays[key].shape, shape)
        return torch.from_numpy(np.concatenate([arrays[key].reshape(-1) for key in self.keys]))

    def unflatten(self, flat: torch.Tensor) -> Arrays:
        """(P,) float32 -> PEFT's named matrices, copied."""
        views = self._views(flat.detach().cpu())
        return {key: view.numpy().copy() for key, view in zip(self.keys, views, strict=True)}

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """d loss / d masters, (P,) float32."""
        pieces = torch.autograd.grad(loss, self.matrices)
        return torch.cat([piece.reshape(-1).float() for piece in pieces])

    def refresh(self) -> None:
        """Let the layers compute with the masters as they are now."""
        if self._computed.dtype != torch.float32:
            self._computed.copy_(self.master.detach())

    @contextlib.contextmanager
    def dropout(self, seed: int) -> Iterator[None]:
        """Drop within the block, by masks that `seed` decides."""
        self._generator.manual_seed(seed)
        for dropout in self._dropouts:
            dropout.train()
        try:
            yield
        finally:
            for dropout in self._dropouts:
                dropout.eval()

    def enable(self, enabled: bool) -> None:
        """Switch all layers to the base alone, or back."""
        if enabled:
            self._tuner.enable_adapter_layers()
        else:
            self._tuner.disable_adapter_layers()

    def remove(self) -> None:
        """Put the plain layers back."""
        self._tuner.unload()

    def _views(self, flat: torch.Tensor) -> Sequence[torch.Tensor]:
        pieces = torch.split(flat, self._sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def _inject(self) -> LoraModel:
        config = LoraConfig(
            target_modules="|".join(
                re.escape(module) for module in self.spec.layers
            ),  # a pattern: only whole names match
            rank_pattern={re.escape(module): rank for module, rank in self.spec.ranks.items()},
            bias="none",
        )
        tuner = LoraModel(self.model, config, ADAPTER, low_cpu_mem_usage=True)  # draws no start of its own
        for module, a, b in zip(self.spec.layers, self.matrices[::2], self.matrices[1::2], strict=True):
            layer = self.model.get_submodule(module)
            layer.__class__ = LoraLinear  # the same parameters under the same names
            layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight = a, b
            layer.scaling[ADAPTER] = self.spec.scales[module]
            if self.spec.dropout:
                layer.lora_dropout[ADAPTER] = KeyedDropout(self.spec.dropout, self._generator)
                self._dropouts.append(layer.lora_dropout[ADAPTER])
        self.model.eval()  # PEFT's new modules call themselves training
        return tuner
