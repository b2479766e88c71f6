"""Matrix products with frozen weights, and PEFT's LoRA layer computed in fewer passes over memory.

The layers keep PEFT's modules and parameters. On an x86 CPU torch multiplies float32 matrices with MKL, which uses half
of the vector width of an AMD processor. oneDNN, which is part of torch too, uses all of it: 240 against 110 GFLOP/s on
one core of Zen 5 (docs/results.md). Both compute entirely in float32.
"""

from typing import Any

import peft.tuners.lora
import torch
import torch.nn as nn

ADAPTER = "default"  # PEFT's default adapter name

_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"  # with narrower vectors both are equally fast
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # torch.compile uses it for linear layers; not a public API
)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T + bias, with oneDNN where that is faster. Not differentiable by autograd.

    Args:
        x: (..., in).
        weight: (out, in); may be a transposed view.
        bias: (out,).

    Returns:
        (..., out).
    """
    if _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(x, weight, bias)


class _FrozenLinearFunction(torch.autograd.Function):
    """The autograd function of `linear`. Only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(upstream, weight.t()), None, None


class _LoraLinearFunction(torch.autograd.Function):
    """The autograd function of a LoRA layer, y = x W^T + bias + scale (x A^T) B^T.

    With g = dloss/dy and n = scale g B, the gradients are

        dloss/dx = g W + n A        dloss/dA = n^T x        dloss/dB = scale g^T (x A^T)

    The low-rank products are added in place, so that no (N, out) or (N, in) tensors are allocated except y and
    dloss/dx.
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
        y = linear(rows, weight, bias).addmm_(narrow, b.T, alpha=scale)
        ctx.save_for_backward(x, narrow, weight, a, b)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, narrow, weight, a, b = ctx.saved_tensors
        rows, gradient = x.reshape(-1, x.shape[-1]), upstream.reshape(-1, upstream.shape[-1])
        narrow_gradient = (gradient @ b).mul_(ctx.scale)  # (N, r)
        d_x = None
        if ctx.needs_input_grad[0]:  # not for the first block, whose input is the frozen embedding
            d_x = linear(gradient, weight.t()).addmm_(narrow_gradient, a).view(x.shape)
        d_a = narrow_gradient.T @ rows
        d_b = (narrow.T @ gradient).mul_(ctx.scale).T
        return d_x, None, None, d_a, d_b, None


class FrozenLinear(nn.Linear):
    """A linear layer with frozen weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        y: torch.Tensor = _FrozenLinearFunction.apply(x, self.weight, self.bias)
        return y


class LoraLinear(peft.tuners.lora.Linear):
    """PEFT's LoRA layer with one unmerged adapter. With dropout, it uses PEFT's own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if self.disable_adapters or self.lora_dropout[ADAPTER].training:
            return super().forward(x)
        base = self.base_layer
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        y: torch.Tensor = _LoraLinearFunction.apply(x, base.weight, base.bias, a, b, self.scaling[ADAPTER])
        return y


def freeze(model: nn.Module) -> None:
    """Freeze a model, and turn every plain linear layer into a `FrozenLinear` with the same weights and name."""
    model.requires_grad_(False)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear
