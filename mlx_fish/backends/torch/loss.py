"""Cross-entropy over a large vocabulary in a single pass that also computes the gradient.

The computation is the same as in `backends/mlx/loss.py`, which has the derivation. For each of N hidden states, a loop
over chunks of the vocabulary accumulates, over all entries except the target, the running maximum m' of the logits,
s' = sum_v exp(l_v - m') and R' = sum_v exp(l_v - m') W_v. No (N, V) tensor is ever allocated. The head is frozen under
LoRA, so R' is all that the backward pass needs.
"""

from typing import Any

import torch

from mlx_fish.backends.torch.products import linear

CHUNK_BYTES = 32 << 20  # maximum size of one chunk of float32 logits
MIN_CHUNK = 1024  # minimum number of vocabulary entries in a chunk


def token_losses(
    weight: torch.Tensor,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    with_gradient: bool = True,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the cross-entropy of each row and its gradient with respect to the hidden states.

    Not differentiable by autograd; `log_probs` is.

    Args:
        weight: the head, (V, D), any float dtype.
        hidden: (N, D), of the same dtype.
        targets: (N,) int64 in [0, V); the caller checks the range.
        with_gradient: also compute the gradient.
        chunk: number of vocabulary entries in a chunk; default: as many as CHUNK_BYTES allows.

    Returns:
        the losses (N,), float32, nats, and dloss_i/dh_i (N, D), float32; None without `with_gradient`.
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
        in_chunk = (targets >= start) & (targets < start + rows.shape[0])
        columns = (targets - start).clamp(0, rows.shape[0] - 1)
        # l_t comes from the same product as the other logits. In half precision the product is rounded by up to 0.06,
        # and l_t must have the same rounding wherever the formulas use it.
        chunk_target_logit = logits.gather(1, columns)
        target_logit = torch.where(in_chunk, chunk_target_logit, target_logit)
        other_logits = logits.scatter_(1, columns, chunk_target_logit.masked_fill(in_chunk, -torch.inf))
        new_max = torch.maximum(running_max, other_logits.amax(dim=-1, keepdim=True))
        factors = other_logits.sub_(new_max).exp_()  # in place: this is the largest tensor of a step
        decay = torch.exp(running_max - new_max)  # 0 in the first chunk, where there is nothing to rescale
        running_sum = running_sum * decay + factors.sum(dim=-1, keepdim=True)
        if weighted_rows is not None:
            weighted_rows.mul_(decay).add_(linear(factors.to(rows.dtype), rows.T))
        running_max = new_max
    full_max = torch.maximum(running_max, target_logit)  # m
    rescale = torch.exp(running_max - full_max)  # exp(m' - m)
    full_sum = running_sum * rescale + torch.exp(target_logit - full_max)  # s
    losses = (full_max + torch.log(full_sum) - target_logit)[:, 0]
    if weighted_rows is None:
        return losses, None
    gradients = weighted_rows.sub_(running_sum * weight[targets[:, 0]].float()).mul_(rescale / full_sum)
    return losses, gradients


class _LogProbs(torch.autograd.Function):
    """The autograd function of -`token_losses`.

    The forward pass computes the gradient, so the backward pass is one multiplication.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int | None
    ) -> torch.Tensor:
        losses, gradient = token_losses(weight, hidden, targets, with_gradient=ctx.needs_input_grad[0], chunk=chunk)
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return -losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (-upstream[:, None] * gradient).to(ctx.dtype), None, None, None


def log_probs(
    weight: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """Return the log-probability of each row's target, (N,) float32. Only `hidden` has a gradient.

    The arguments are those of `token_losses`.
    """
    result: torch.Tensor = _LogProbs.apply(hidden, weight, targets, chunk)
    return result
