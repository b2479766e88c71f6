"""Cross-entropy over a large vocabulary in one pass, with its gradient ready when the forward ends.

The computation of `backends/mlx/loss.py`, in torch: a loop over chunks of the vocabulary keeps, for each of N hidden rows, the
running maximum m, the sum s = sum_v exp(l_v - m) and R = sum_v exp(l_v - m) W_v (the online softmax of arXiv 1805.02867). Then

    loss  = m + log s - l_target          dloss/dh = R / s - W_target

and no (N, V) tensor ever exists. The head is frozen under LoRA, so R is all that the backward needs.
"""

from typing import Any

import torch

from mlx_fish.backends.torch.products import linear

CHUNK_BYTES = 32 << 20  # of float32 logits held at a time
MIN_CHUNK = 1024


def token_losses(
    weight: torch.Tensor,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    with_gradient: bool = True,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of each row, and its gradient to the hidden states. Not differentiable itself: see `log_probs`.

    Args:
        weight: the head, (V, D), any float type.
        hidden: (N, D), of the same type.
        targets: (N,) int64 in [0, V); the caller checks the range.
        chunk: vocabulary entries at a time; default: what CHUNK_BYTES allows.

    Returns:
        losses (N,) float32 in nats, and dloss_i/dh_i (N, D) float32, None without `with_gradient`.
    """
    num_rows = hidden.shape[0]
    chunk = chunk or max(MIN_CHUNK, CHUNK_BYTES // (4 * num_rows))
    top = torch.full((num_rows, 1), -torch.inf, device=hidden.device)
    total = torch.zeros_like(top)
    blend = torch.zeros(hidden.shape, device=hidden.device) if with_gradient else None
    for start in range(0, weight.shape[0], chunk):
        rows = weight[start : start + chunk]
        logits = linear(hidden, rows).float()
        new_top = torch.maximum(top, logits.amax(dim=-1, keepdim=True))
        factors = logits.sub_(new_top).exp_()  # in place: this is the largest tensor of a step
        decay = torch.exp(top - new_top)  # 0 in the first chunk, where nothing is there to rescale
        total = total * decay + factors.sum(dim=-1, keepdim=True)
        if blend is not None:
            blend.mul_(decay).add_(linear(factors.to(rows.dtype), rows.T))
        top = new_top
    target_rows = weight[targets].float()
    target_logits = (hidden.float() * target_rows).sum(dim=-1)
    found = top[:, 0] + torch.log(total[:, 0]) - target_logits
    return found, None if blend is None else blend.div_(total).sub_(target_rows)


class _LogProbs(torch.autograd.Function):
    """-`token_losses` for autograd: the forward computes the gradient, the backward is one product."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int | None
    ) -> torch.Tensor:
        found, gradient = token_losses(weight, hidden, targets, with_gradient=ctx.needs_input_grad[0], chunk=chunk)
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return -found

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (-upstream[:, None] * gradient).to(ctx.dtype), None, None, None


def log_probs(
    weight: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """Log-probability of each row's target, (N,) float32; the gradient flows to `hidden` alone. Arguments as in `token_losses`."""
    found: torch.Tensor = _LogProbs.apply(hidden, weight, targets, chunk)
    return found
