"""PEFT's LoRA layers on a transformers model, and the flat vector that holds every trainable number.

PEFT makes the layers, and `products.py` computes them. The masters are one float32 vector, as in `backends/mlx/lora.py`, so
that clipping and AdamW are a few operations instead of a few for each of 336 matrices. PEFT's matrices are views: of the
masters themselves in float32, else of a copy in the model's dtype that `refresh` brings up to date.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn
from peft import LoraConfig, LoraModel

from mlx_fish.adapters.spec import AdapterSpec, Arrays, FlatLayout
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
    """The LoRA layers of a model, and the map between the flat vector and their tensors.

    Attributes:
        master: (P,) float32, what the optimizer moves.
        tensors: those of each layer in turn, in the model's dtype: what the layers compute with.
    """

    def __init__(self, model: nn.Module, spec: AdapterSpec, arrays: Arrays):
        self.model = model
        self.spec = spec
        self.layout = FlatLayout(spec)
        weight = next(model.parameters())
        self.master = nn.Parameter(self.flatten(arrays).to(weight.device))
        self._computed = self.master.detach().to(weight.dtype)  # the same memory when that is float32
        self.tensors = [nn.Parameter(view) for view in self._views(self._computed)]
        self._generator = torch.Generator(device=weight.device)
        self._dropouts: list[KeyedDropout] = []
        self._tuner = self._inject()

    def flatten(self, arrays: Arrays) -> torch.Tensor:
        """PEFT's named tensors -> (P,) float32 on the CPU."""
        return torch.from_numpy(self.layout.flatten(arrays))

    def unflatten(self, flat: torch.Tensor) -> Arrays:
        """(P,) float32 -> PEFT's named tensors, copied."""
        return self.layout.unflatten(flat.detach().cpu().numpy().copy())

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """d loss / d masters, (P,) float32."""
        pieces = torch.autograd.grad(loss, self.tensors)
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
        pieces = torch.split(flat, self.layout.sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self.layout.shapes, strict=True)]

    def _inject(self) -> LoraModel:
        config = LoraConfig(
            target_modules="|".join(
                re.escape(module) for module in self.spec.layers
            ),  # a pattern: only whole names match
            rank_pattern={re.escape(module): layer.rank for module, layer in self.spec.layers.items()},
            bias="none",
        )
        tuner = LoraModel(self.model, config, ADAPTER, low_cpu_mem_usage=True)  # draws no start of its own
        for (module, layer_spec), tensors in zip(
            self.spec.layers.items(), self.layout.by_layer(self.tensors), strict=True
        ):
            layer = self.model.get_submodule(module)
            layer.__class__ = LoraLinear  # the same parameters under the same names
            layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight = tensors
            layer.scaling[ADAPTER] = layer_spec.scale
            if self.spec.dropout:
                layer.lora_dropout[ADAPTER] = KeyedDropout(self.spec.dropout, self._generator)
                self._dropouts.append(layer.lora_dropout[ADAPTER])
        self.model.eval()  # PEFT's new modules call themselves training
        return tuner
