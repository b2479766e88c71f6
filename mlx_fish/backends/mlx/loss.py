"""Cross-entropy over a large vocabulary in one pass, with its gradient ready when the forward ends.

For N hidden rows h and the head W (V, D), a loop over chunks of the vocabulary keeps, for each row, over all entries but the
target t: the running maximum m' of the logits, s' = sum_v exp(l_v - m') and R' = sum_v exp(l_v - m') W_v, rescaled when m' grows
(the online softmax of arXiv 1805.02867). Then, with m = max(m', l_t) and s = s' exp(m' - m) + exp(l_t - m),

    loss  = m + log s - l_t          dloss/dh = (R' - s' W_t) exp(m' - m) / s

The target is kept apart because a row that is learnt gives it nearly all of s. With W_t in R, the gradient would be the small
difference of two large numbers, each rounded to the model's type; and with l_t in m', every factor exp(l_v - m') would be so
small that float16 has no digits for it.

No (N, V) array ever exists and nothing is recomputed in the backward pass: the head is frozen under LoRA, so R' is all that the
backward needs, at the cost of the plain head's products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import mlx_fish.backends.mlx.runtime as runtime  # isort: skip
import mlx.core as mx
import mlx.nn as nn

from mlx_fish.backends.limits import MLX_LOSS_CHUNK_BYTES, MLX_LOSS_MAX_CHUNK, MLX_LOSS_MIN_CHUNK
from mlx_fish.backends.mlx.activations import exp, row_sums

CHUNK_BYTES = MLX_LOSS_CHUNK_BYTES["gpu" if runtime.on_gpu else "cpu"]


@dataclass(frozen=True)
class Head:
    """The output layer, dense or quantised, tied or not: `weight` is (V, D), or packed with `scales` and `biases`."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    @classmethod
    def of(cls, model: nn.Module) -> "Head":
        """The head of an mlx-lm model; a tied one is the embedding itself."""
        layer = model.lm_head if "lm_head" in model else model.model.embed_tokens
        if "scales" not in layer:
            return cls(layer.weight)
        return cls(layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode)

    @property
    def vocab_size(self) -> int:
        return int(self.weight.shape[0])

    def logits(self, hidden: mx.array, start: int, stop: int) -> mx.array:
        """(N, D) -> (N, stop - start) float32."""
        return self._product(hidden, start, stop, transpose=True).astype(mx.float32)

    def weighted_rows(self, factors: mx.array, start: int, stop: int, dtype: mx.Dtype) -> mx.array:
        """sum_v factors[:, v] W_v over the chunk: (N, stop - start) -> (N, D) float32."""
        return self._product(factors.astype(dtype), start, stop, transpose=False).astype(mx.float32)

    def rows(self, targets: mx.array) -> mx.array:
        """W[targets]: (N,) -> (N, D) float32."""
        if self.scales is None:
            return self.weight[targets].astype(mx.float32)
        biases = None if self.biases is None else self.biases[targets]
        rows = mx.dequantize(
            self.weight[targets],
            self.scales[targets],
            biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        return rows.astype(mx.float32)

    def _product(self, left: mx.array, start: int, stop: int, *, transpose: bool) -> mx.array:
        weight = self.weight[start:stop]
        if self.scales is None:
            return left @ (weight.T if transpose else weight)
        biases = None if self.biases is None else self.biases[start:stop]
        return mx.quantized_matmul(
            left,
            weight,
            self.scales[start:stop],
            biases,
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )


def token_losses(head: Head, hidden: mx.array, targets: mx.array, chunk: int | None = None) -> mx.array:
    """Cross-entropy of each row.

    Args:
        hidden: (N, D), any float type.
        targets: (N,) int32 in [0, V); the caller checks the range.
        chunk: vocabulary entries at a time; default: what CHUNK_BYTES allows.

    Returns:
        (N,) float32, in nats.
    """
    return _one_pass(head, hidden, targets, chunk, with_gradients=False)[0]


def token_losses_and_gradients(
    head: Head, hidden: mx.array, targets: mx.array, chunk: int | None = None
) -> tuple[mx.array, mx.array]:
    """As `token_losses`, and dloss_i/dh_i (N, D) float32."""
    return _one_pass(head, hidden, targets, chunk, with_gradients=True)


def _one_pass(
    head: Head, hidden: mx.array, targets: mx.array, chunk: int | None, *, with_gradients: bool
) -> tuple[mx.array, mx.array]:
    """The losses (N,), and their gradients (N, D) where they are wanted (else a scalar 0)."""
    chunk = chunk or min(MLX_LOSS_MAX_CHUNK, max(MLX_LOSS_MIN_CHUNK, CHUNK_BYTES // (4 * hidden.shape[0])))
    targets = targets[:, None]
    # An array (V,): numbers written into the graph would be compiled into a kernel for each chunk.
    numbers = mx.arange(head.vocab_size)
    running_max = mx.full((hidden.shape[0], 1), -mx.inf)  # m'
    target_logit = mx.zeros((hidden.shape[0], 1))  # l_t
    running_sum = mx.zeros((hidden.shape[0], 1))  # s'
    weighted_rows = mx.zeros(hidden.shape) if with_gradients else mx.array(0.0)  # R' (N, D)
    for start in range(0, head.vocab_size, chunk):
        stop = min(start + chunk, head.vocab_size)
        # Without this, the scheduler may compute many chunks' logits before it folds the first one in.
        rows = mx.depends(hidden, [target_logit, running_sum, weighted_rows]) if start else hidden
        logits = head.logits(rows, start, stop)  # (N, chunk)
        first, last = numbers[start : start + 1], numbers[stop - 1 : stop]
        # l_t as the product rounded it: in half precision by up to 0.06, which must be the same wherever l_t stands.
        picked = mx.take_along_axis(logits, mx.clip(targets, first, last) - first, axis=-1)
        target_logit = mx.where((targets >= first) & (targets <= last), picked, target_logit)
        others = mx.where(numbers[start:stop] == targets, -mx.inf, logits)
        new_max = mx.maximum(running_max, others.max(axis=-1, keepdims=True))
        factors, decay = exp(others - new_max), exp(running_max - new_max)  # (N, chunk), (N, 1); decay is 0 at first
        running_sum = running_sum * decay + row_sums(factors)
        if with_gradients:
            weighted_rows = weighted_rows * decay + head.weighted_rows(factors, start, stop, hidden.dtype)
        running_max = new_max
    whole_max = mx.maximum(running_max, target_logit)  # m
    share = exp(running_max - whole_max)
    whole_sum = running_sum * share + exp(target_logit - whole_max)  # s
    losses = (whole_max + mx.log(whole_sum) - target_logit)[:, 0]
    if not with_gradients:
        return losses, weighted_rows
    return losses, (weighted_rows - running_sum * head.rows(targets[:, 0])) * (share / whole_sum)


def make_log_probs(head: Head, chunk: int | None = None) -> Callable[[mx.array, mx.array], mx.array]:
    """A differentiable `log_probs(hidden, targets)`: (N, D), (N,) -> (N,) float32; its gradient flows to `hidden` alone."""

    @mx.custom_function
    def log_probs(hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        losses, gradients = token_losses_and_gradients(head, hidden, targets, chunk)
        return -losses, gradients

    @log_probs.vjp
    def log_probs_vjp(
        primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
    ) -> tuple[mx.array, mx.array]:
        hidden, targets = primals
        return (-cotangents[0][:, None] * outputs[1]).astype(hidden.dtype), mx.zeros_like(targets)

    return lambda hidden, targets: cast(tuple[mx.array, mx.array], log_probs(hidden, targets))[0]
