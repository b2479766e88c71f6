"""One optimizer update as a pure function of arrays: forward, loss, backward, clip, AdamW, compiled as one.

The state is three vectors (masters and AdamW's two moments) and the number of updates done, so a compiled step has few inputs
and nothing hidden.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_fish.backends import StepResult
from mlx_fish.backends.mlx.attention import PackedRows
from mlx_fish.backends.mlx.checkpointing import checkpointed
from mlx_fish.backends.mlx.lora import LoraLayers
from mlx_fish.backends.mlx.loss import Head, make_loss, token_losses
from mlx_fish.batches import Batch, check_ids

BETA1, BETA2, EPSILON, MAX_NORM = 0.9, 0.999, 1e-8, 1.0


@dataclass
class State:
    """What training changes: (P,) float32 masters and moments, and the updates done."""

    flat: mx.array
    first: mx.array
    second: mx.array
    step: int = 0


class Step:
    """The update and the evaluation of one model with one set of LoRA layers."""

    def __init__(self, model: nn.Module, layers: LoraLayers, *, grad_checkpoint: bool = False):
        self.model = model
        self.layers = layers
        self.grad_checkpoint = grad_checkpoint
        self.head = Head.of(model)
        self.losses = make_loss(self.head)
        self._update_one = mx.compile(self._gradient_and_update)
        self._gradient = mx.compile(self._loss_and_gradient)
        self._update = mx.compile(self._clip_and_update)
        self._loss_sum = mx.compile(self._summed_loss)

    def __call__(
        self, state: State, batches: Sequence[Batch], learning_rate: float, dropout_seeds: Sequence[int]
    ) -> Callable[[], StepResult]:
        """Start the update, change `state`, and return a call that waits for the result."""
        num_supervised = sum(batch.num_supervised for batch in batches)
        inputs = [
            self._micro_batch(batch, seed, num_supervised) for batch, seed in zip(batches, dropout_seeds, strict=True)
        ]
        scalars = mx.array(learning_rate, mx.float32), mx.array(state.step + 1, mx.float32)
        vectors = state.flat, state.first, state.second
        if len(inputs) == 1:
            *changed, loss, norm, good = self._update_one(*vectors, *scalars, inputs[0])
        else:
            loss, gradient = self._gradient(state.flat, inputs[0])
            for arrays in inputs[1:]:
                mx.async_eval(loss, gradient)  # one micro-batch's activations at a time
                more_loss, more = self._gradient(state.flat, arrays)
                loss, gradient = loss + more_loss, gradient + more
            *changed, norm, good = self._update(*vectors, *scalars, loss, gradient)
        state.flat, state.first, state.second = changed
        state.step += 1
        mx.async_eval(*changed, loss, norm, good)
        return lambda: StepResult(_number(loss), _number(norm), bool(good.item()))

    def evaluate(self, flat: mx.array | None, batch: Batch) -> float:
        """Summed loss over the batch, with the masters (P,) or, without them, of the base alone."""
        matrices = [] if flat is None else self.layers.split(flat)
        return _number(self._loss_sum(matrices, self._arrays(batch, batch.weights)))

    def _micro_batch(self, batch: Batch, dropout_seed: int, num_supervised: int) -> dict[str, mx.array]:
        weights = batch.weights / np.float32(num_supervised)  # the whole update's count: never a mean of means
        return self._arrays(batch, weights) | {"key": mx.random.key(dropout_seed)}

    def _arrays(self, batch: Batch, weights: npt.NDArray[np.float32]) -> dict[str, mx.array]:
        check_ids(batch.inputs, batch.targets, self.head.vocab_size)
        arrays = {"inputs": batch.inputs, "positions": batch.positions, "targets": batch.targets, "weights": weights}
        if batch.packing is not None:
            arrays |= {"grid": batch.packing.grid, "slots": batch.packing.slots}
        return {name: mx.array(array) for name, array in arrays.items()}

    def _hidden(self, batch: dict[str, mx.array]) -> mx.array:
        """(N, D) hidden states of the supervised positions: no other ever meets the vocabulary."""
        model = self.model.model
        if "grid" in batch:
            hidden = model.embed_tokens(batch["inputs"])
            rows = PackedRows(batch["grid"], batch["slots"])
            for block in model.layers:
                hidden = block(hidden, rows)
            hidden = model.norm(hidden)
        else:
            hidden = model(batch["inputs"])
        return hidden.reshape(-1, hidden.shape[-1])[batch["positions"]]

    def _summed_loss(self, matrices: list[mx.array], batch: dict[str, mx.array]) -> mx.array:
        if matrices:
            self.layers.bind(matrices)
        else:
            self.layers.unbind()  # generate() leaves them bound, and a trace would keep them for good
        losses = token_losses(self.head, self._hidden(batch), batch["targets"])
        self.layers.unbind()
        return (losses * batch["weights"]).sum()

    def _loss_and_gradient(self, flat: mx.array, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        """The micro-batch's share of the mean loss, and its gradient (P,)."""

        def loss_of(matrices: list[mx.array]) -> mx.array:
            self.layers.bind(matrices, batch["key"])
            with checkpointed(self.model) if self.grad_checkpoint else nullcontext():
                hidden = self._hidden(batch)
            return (self.losses(hidden, batch["targets"]) * batch["weights"]).sum()

        # By matrix, not by vector: the gradient of a slice would be a vector of zeros for each of 336 slices.
        loss, gradients = mx.value_and_grad(loss_of)(self.layers.split(flat))
        self.layers.unbind()  # the layers must not keep this trace's placeholders
        return loss, mx.concatenate([gradient.reshape(-1) for gradient in gradients])

    def _gradient_and_update(
        self,
        flat: mx.array,
        first: mx.array,
        second: mx.array,
        learning_rate: mx.array,
        step: mx.array,
        batch: dict[str, mx.array],
    ) -> tuple[mx.array, ...]:
        loss, gradient = self._loss_and_gradient(flat, batch)
        *changed, norm, good = self._clip_and_update(flat, first, second, learning_rate, step, loss, gradient)
        return (*changed, loss, norm, good)

    @staticmethod
    def _clip_and_update(
        flat: mx.array,
        first: mx.array,
        second: mx.array,
        learning_rate: mx.array,
        step: mx.array,
        loss: mx.array,
        gradient: mx.array,
    ) -> tuple[mx.array, ...]:
        """Clip to MAX_NORM as torch does, then AdamW with bias correction and no decay; nothing moves if loss or norm is not finite."""
        norm = mx.sqrt((gradient * gradient).sum())
        good = mx.isfinite(norm) & mx.isfinite(loss)
        gradient = gradient * mx.minimum(MAX_NORM / (norm + 1e-6), 1.0)
        new_first = BETA1 * first + (1 - BETA1) * gradient
        new_second = BETA2 * second + (1 - BETA2) * gradient * gradient
        corrected = mx.sqrt(new_second / (1 - BETA2**step)) + EPSILON
        new_flat = flat - learning_rate * (new_first / (1 - BETA1**step)) / corrected
        return (
            mx.where(good, new_flat, flat),
            mx.where(good, new_first, first),
            mx.where(good, new_second, second),
            norm,
            good,
        )


def _number(scalar: mx.array) -> float:
    value = scalar.item()
    assert isinstance(value, float)
    return value
