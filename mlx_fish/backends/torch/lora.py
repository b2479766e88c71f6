"""PEFT's LoRA layers on a transformers model, and the flat vector of all trainable parameters.

PEFT creates the layers, and `products.py` computes them. The master weights are one float32 vector, as in
`backends/mlx/lora.py`, so that clipping and AdamW are a few operations in total instead of a few for each of 336
matrices. PEFT's matrices are views: of the masters if the model is in float32, else of a copy in the model's dtype
that `refresh` updates.
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
    """Dropout with its own generator, seeded for each micro-batch. Does not use torch's global generator."""

    def __init__(self, probability: float, generator: torch.Generator):
        super().__init__()
        self.probability = probability
        self.generator = generator
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., in)."""
        if not self.training:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.probability, generator=self.generator)
        return x * keep / (1 - self.probability)


class LoraLayers:
    """The LoRA layers of a model, and the map between the flat vector and their tensors.

    Attributes:
        master: (P,) float32, the parameters that the optimizer updates.
        tensors: the A and B of each layer in order, in the model's dtype, used by the layers.
    """

    def __init__(self, model: nn.Module, spec: AdapterSpec, arrays: Arrays):
        self.model = model
        self.spec = spec
        self.layout = FlatLayout(spec)
        weight = next(model.parameters())
        self.master = nn.Parameter(self.flatten(arrays).to(weight.device))
        self._working_copy = self.master.detach().to(weight.dtype)  # shares the masters' memory in float32
        self.tensors = [nn.Parameter(view) for view in self._views(self._working_copy)]
        self._generator = torch.Generator(device=weight.device)
        self._dropouts: list[KeyedDropout] = []
        self._tuner = self._inject()

    def flatten(self, arrays: Arrays) -> torch.Tensor:
        """Return the tensors under PEFT's keys as one vector (P,), float32, on the CPU."""
        return torch.from_numpy(self.layout.flatten(arrays))

    def unflatten(self, flat: torch.Tensor) -> Arrays:
        """Return copies of the parts of a vector (P,), float32, as NumPy arrays under PEFT's keys."""
        return self.layout.unflatten(flat.detach().cpu().numpy().copy())

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the loss with respect to the masters, (P,) float32."""
        gradients = torch.autograd.grad(loss, self.tensors)
        return torch.cat([gradient.reshape(-1).float() for gradient in gradients])

    def refresh(self) -> None:
        """Copy the current masters to the tensors that the layers use."""
        if self._working_copy.dtype != torch.float32:
            self._working_copy.copy_(self.master.detach())

    @contextlib.contextmanager
    def dropout(self, seed: int) -> Iterator[None]:
        """Enable dropout inside a `with` statement, with masks determined by `seed`."""
        self._generator.manual_seed(seed)
        for dropout in self._dropouts:
            dropout.train()
        try:
            yield
        finally:
            for dropout in self._dropouts:
                dropout.eval()

    def enable(self, enabled: bool) -> None:
        """Enable or disable the adapter in all layers."""
        if enabled:
            self._tuner.enable_adapter_layers()
        else:
            self._tuner.disable_adapter_layers()

    def remove(self) -> None:
        """Replace the LoRA layers by the original linear layers."""
        self._tuner.unload()

    def _views(self, flat: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return views of a vector (P,), one for each tensor."""
        pieces = torch.split(flat, self.layout.sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self.layout.shapes, strict=True)]

    def _inject(self) -> LoraModel:
        """Insert PEFT's LoRA layers into the model, and set their tensors, scales and dropout."""
        config = LoraConfig(
            target_modules="|".join(
                re.escape(module) for module in self.spec.layers
            ),  # PEFT matches a string as a regular expression against the full module path
            rank_pattern={re.escape(module): layer.rank for module, layer in self.spec.layers.items()},
            bias="none",
        )
        tuner = LoraModel(self.model, config, ADAPTER, low_cpu_mem_usage=True)  # skips PEFT's initialisation
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
        self.model.eval()  # PEFT's new modules start in training mode
        return tuner
