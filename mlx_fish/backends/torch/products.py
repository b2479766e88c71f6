"""Products with frozen weights, and a LoRA layer made of them: PEFT's modules and parameters, computed in fewer passes.

On an x86 CPU torch multiplies float32 with MKL, which uses half of the vector width of an AMD processor. oneDNN, which torch brings too,
uses all of it: 240 against 110 GFLOP/s on one core of Zen 5 (docs/results.md). Both compute in float32 throughout.
"""

from typing import Any

import peft.tuners.lora
import torch
import torch.nn as nn

ADAPTER = "default"  # the name that PEFT gives an adapter by itself

_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"  # with narrower vectors the two are equal
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # what torch.compile makes of a linear layer; not a public name
)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., in), (out, in), (out,) -> x W^T + bias, (..., out). Not differentiable itself; `weight` may be a transposed view."""
    if _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return nn.functional.linear(x, weight, bias)


class _Frozen(torch.autograd.Function):
    """`linear` for autograd; the gradient flows to x alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(upstream, weight.t()), None, None


class _Adapted(torch.autograd.Function):
    """y = x W^T + bias + scale (x A^T) B^T, and with g = dloss/dy, n = scale g B:

        dloss/dx = g W + n A        dloss/dA = n^T x        dloss/dB = scale g^T (x A^T)

    The narrow products are added in place, so that no tensor as wide as a layer is made but y and dloss/dx.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        narrow = rows @ a.T  # (N, r)
        out = linear(rows, weight, bias).addmm_(narrow, b.T, alpha=scale)
        ctx.save_for_backward(x, narrow, weight, a, b)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, narrow, weight, a, b = ctx.saved_tensors
        rows, gradient = x.reshape(-1, x.shape[-1]), upstream.reshape(-1, upstream.shape[-1])
        narrow_gradient = (gradient @ b).mul_(ctx.scale)  # (N, r)
        to_x = None
        if ctx.needs_input_grad[0]:  # the first block's input is the frozen embedding
            to_x = linear(gradient, weight.t()).addmm_(narrow_gradient, a).view(x.shape)
        to_a = narrow_gradient.T @ rows
        to_b = (narrow.T @ gradient).mul_(ctx.scale).T
        return to_x, None, None, to_a, to_b, None


class FrozenLinear(nn.Linear):
    """A linear layer whose weights never change."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        found: torch.Tensor = _Frozen.apply(x, self.weight, self.bias)
        return found


class LoraLinear(peft.tuners.lora.Linear):
    """PEFT's layer with one unmerged adapter; where it drops, the computation is PEFT's as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if self.disable_adapters or self.lora_dropout[ADAPTER].training:
            return super().forward(x)
        base = self.base_layer
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        found: torch.Tensor = _Adapted.apply(x, base.weight, base.bias, a, b, self.scaling[ADAPTER])
        return found


def freeze(model: nn.Module) -> None:
    """Let every plain linear layer of a model compute as `FrozenLinear`; weights and names stay as they are."""
    model.requires_grad_(False)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear
