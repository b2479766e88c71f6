"""Cross-entropy over a large vocabulary in a single pass that also computes the gradient.

For N hidden states h (N, D) and the head W (V, D), a loop over chunks of the vocabulary accumulates, for each row and
over all entries except the target t:

    m'  the running maximum of the logits l_v
    s'  = sum_v exp(l_v - m')
    R'  = sum_v exp(l_v - m') W_v

s' and R' are rescaled when m' grows (the online softmax of arXiv 1805.02867). With m = max(m', l_t) and
s = s' exp(m' - m) + exp(l_t - m), the loss and its gradient are

    loss  = m + log s - l_t          dloss/dh = (R' - s' W_t) exp(m' - m) / s

The target is kept separate because, in a row that the model has learnt, it contributes nearly all of s. With W_t in
R', the gradient would be the small difference of two large numbers, each rounded to the model's dtype. With l_t in m',
every factor exp(l_v - m') would be too small for float16 to represent.

No (N, V) array is ever allocated, and the backward pass recomputes nothing: the head is frozen under LoRA, so R' is
all that the backward pass needs. The matrix products cost the same as those of the plain head.
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
    """The output projection, dense or quantised, tied or untied.

    Attributes:
        weight: (V, D), or packed (V, D * bits / 32) if quantised.
        scales, biases: (V, D / group_size) if quantised, else None.
        group_size, bits, mode: the parameters of the quantisation.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    @classmethod
    def of(cls, model: nn.Module) -> "Head":
        """Return the head of an mlx-lm model; for a tied head, the embedding."""
        layer = model.lm_head if "lm_head" in model else model.model.embed_tokens
        if "scales" not in layer:
            return cls(layer.weight)
        return cls(layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode)

    @property
    def vocab_size(self) -> int:
        return int(self.weight.shape[0])

    def logits(self, hidden: mx.array, start: int, stop: int) -> mx.array:
        """Return the logits of a chunk of the vocabulary: (N, D) -> (N, stop - start) float32."""
        return self._product(hidden, start, stop, transpose=True).astype(mx.float32)

    def weighted_rows(self, factors: mx.array, start: int, stop: int, dtype: mx.Dtype) -> mx.array:
        """Return sum_v factors[:, v] W_v over a chunk of the vocabulary: (N, stop - start) -> (N, D) float32."""
        return self._product(factors.astype(dtype), start, stop, transpose=False).astype(mx.float32)

    def rows(self, targets: mx.array) -> mx.array:
        """Return W[targets]: (N,) -> (N, D) float32."""
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
    """Return the cross-entropy of each row.

    Args:
        head: the output projection.
        hidden: (N, D), any float dtype.
        targets: (N,) int32 in [0, V); the caller checks the range.
        chunk: number of vocabulary entries in a chunk; default: as many as CHUNK_BYTES allows.

    Returns:
        (N,) float32, nats.
    """
    return _single_pass(head, hidden, targets, chunk, with_gradients=False)[0]


def token_losses_and_gradients(
    head: Head, hidden: mx.array, targets: mx.array, chunk: int | None = None
) -> tuple[mx.array, mx.array]:
    """Return the losses of `token_losses`, (N,) float32, and their gradients dloss_i/dh_i, (N, D) float32."""
    return _single_pass(head, hidden, targets, chunk, with_gradients=True)


def _single_pass(
    head: Head, hidden: mx.array, targets: mx.array, chunk: int | None, *, with_gradients: bool
) -> tuple[mx.array, mx.array]:
    """Return the losses (N,) and, `with_gradients`, their gradients (N, D), else a scalar 0; all float32."""
    chunk = chunk or min(MLX_LOSS_MAX_CHUNK, max(MLX_LOSS_MIN_CHUNK, CHUNK_BYTES // (4 * hidden.shape[0])))
    targets = targets[:, None]
    # An array (V,): Python numbers would become constants of the graph, and each chunk would need a kernel of its own.
    vocab_ids = mx.arange(head.vocab_size)
    running_max = mx.full((hidden.shape[0], 1), -mx.inf)  # m'
    target_logit = mx.zeros((hidden.shape[0], 1))  # l_t
    running_sum = mx.zeros((hidden.shape[0], 1))  # s'
    weighted_rows = mx.zeros(hidden.shape) if with_gradients else mx.array(0.0)  # R' (N, D)
    for start in range(0, head.vocab_size, chunk):
        stop = min(start + chunk, head.vocab_size)
        # Without this dependency, MLX may compute the logits of many chunks before it accumulates the first one.
        ordered_hidden = mx.depends(hidden, [target_logit, running_sum, weighted_rows]) if start else hidden
        logits = head.logits(ordered_hidden, start, stop)  # (N, chunk)
        first, last = vocab_ids[start : start + 1], vocab_ids[stop - 1 : stop]
        # l_t comes from the same product as the other logits. In half precision the product is rounded by up to 0.06,
        # and l_t must have the same rounding wherever the formulas use it.
        chunk_target_logit = mx.take_along_axis(logits, mx.clip(targets, first, last) - first, axis=-1)
        target_logit = mx.where((targets >= first) & (targets <= last), chunk_target_logit, target_logit)
        other_logits = mx.where(vocab_ids[start:stop] == targets, -mx.inf, logits)
        new_max = mx.maximum(running_max, other_logits.max(axis=-1, keepdims=True))
        factors, decay = exp(other_logits - new_max), exp(running_max - new_max)  # (N, chunk), (N, 1); first decay is 0
        running_sum = running_sum * decay + row_sums(factors)
        if with_gradients:
            weighted_rows = weighted_rows * decay + head.weighted_rows(factors, start, stop, hidden.dtype)
        running_max = new_max
    full_max = mx.maximum(running_max, target_logit)  # m
    rescale = exp(running_max - full_max)  # exp(m' - m)
    full_sum = running_sum * rescale + exp(target_logit - full_max)  # s
    losses = (full_max + mx.log(full_sum) - target_logit)[:, 0]
    if not with_gradients:
        return losses, weighted_rows
    return losses, (weighted_rows - running_sum * head.rows(targets[:, 0])) * (rescale / full_sum)


def make_log_probs(head: Head, chunk: int | None = None) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a differentiable function `log_probs(hidden, targets)`: (N, D), (N,) -> (N,) float32.

    Only `hidden` has a gradient.
    """

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
