"""Cross-entropy over a large vocabulary in one pass, with its gradient ready when the forward ends.

The computation of `backends/mlx/loss.py`, in torch; its derivation stands there. For each of N hidden rows a loop over chunks of
the vocabulary keeps, over all entries but the target, the running maximum m' of the logits, s' = sum_v exp(l_v - m') and
R' = sum_v exp(l_v - m') W_v; no (N, V) tensor ever exists. The head is frozen under LoRA, so R' is all that the backward needs.
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
    targets = targets[:, None]
    running_max = torch.full((num_rows, 1), -torch.inf, device=hidden.device)  # m'
    target_logit, running_sum = torch.zeros_like(running_max), torch.zeros_like(running_max)  # l_t, s'
    weighted_rows = torch.zeros(hidden.shape, device=hidden.device) if with_gradient else None  # R' (N, D)
    for start in range(0, weight.shape[0], chunk):
        rows = weight[start : start + chunk]
        logits = linear(hidden, rows).float()  # (N, chunk)
        inside = (targets >= start) & (targets < start + rows.shape[0])
        places = (targets - start).clamp(0, rows.shape[0] - 1)
        # l_t as the product rounded it: in half precision by up to 0.06, which must be the same wherever l_t stands.
        picked = logits.gather(1, places)
        target_logit = torch.where(inside, picked, target_logit)
        others = logits.scatter_(1, places, picked.masked_fill(inside, -torch.inf))
        new_max = torch.maximum(running_max, others.amax(dim=-1, keepdim=True))
        factors = others.sub_(new_max).exp_()  # in place: this is the largest tensor of a step
        decay = torch.exp(running_max - new_max)  # 0 in the first chunk, where nothing is there to rescale
        running_sum = running_sum * decay + factors.sum(dim=-1, keepdim=True)
        if weighted_rows is not None:
            weighted_rows.mul_(decay).add_(linear(factors.to(rows.dtype), rows.T))
        running_max = new_max
    whole_max = torch.maximum(running_max, target_logit)  # m
    share = torch.exp(running_max - whole_max)
    whole_sum = running_sum * share + torch.exp(target_logit - whole_max)  # s
    losses = (whole_max + torch.log(whole_sum) - target_logit)[:, 0]
    if weighted_rows is None:
        return losses, None
    gradients = weighted_rows.sub_(running_sum * weight[targets[:, 0]].float()).mul_(share / whole_sum)
    return losses, gradients


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
