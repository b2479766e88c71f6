"""Compute one optimizer update in two compiled functions: gradient (forward, loss, backward), then clipping and AdamW.

The state consists of three vectors (master weights and AdamW's two moments) and the number of updates done, so the
compiled functions have few inputs and no hidden state.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_fish.backends.mlx.attention import PackedRows
from mlx_fish.backends.mlx.checkpointing import checkpointed
from mlx_fish.backends.mlx.lora import LoraLayers
from mlx_fish.backends.mlx.loss import Head, make_log_probs, token_losses
from mlx_fish.backends.protocol import Gradient, StepResult
from mlx_fish.data.batches import Batch, check_ids
from mlx_fish.objectives.objective import Labels, LossFunction, negative_log_likelihood

BETA1, BETA2, EPSILON, MAX_NORM = 0.9, 0.999, 1e-8, 1.0


@dataclass
class State:
    """The state of training.

    Attributes:
        flat: (P,) float32 master weights.
        first_moment, second_moment: (P,) float32, AdamW's moments.
        step: number of updates done.
    """

    flat: mx.array
    first_moment: mx.array
    second_moment: mx.array
    step: int = 0


class Step:
    """The compiled gradient, update and evaluation of one model with one set of LoRA layers."""

    def __init__(
        self,
        model: nn.Module,
        layers: LoraLayers,
        *,
        loss: LossFunction = negative_log_likelihood,
        grad_checkpoint: bool = False,
    ):
        self.model = model
        self.layers = layers
        self.loss = loss
        self.grad_checkpoint = grad_checkpoint
        self.head = Head.of(model)
        self.log_probs = make_log_probs(self.head)
        self._gradient = mx.compile(self._loss_and_gradient)
        self._update = mx.compile(self._clip_and_update)
        self._loss = mx.compile(self._loss_without_gradient)

    def gradient(
        self, state: State, batches: Sequence[Batch], num_supervised: int, dropout_seeds: Sequence[int]
    ) -> Gradient:
        """Start to compute the loss and the gradient (P,), float32, summed over the micro-batches."""
        total: Gradient | None = None
        for batch, seed in zip(batches, dropout_seeds, strict=True):
            weights = batch.weights / np.float32(num_supervised)
            arrays = self._arrays(batch, weights) | {"key": mx.random.key(seed)}
            if total is not None:
                mx.async_eval(total.loss, total.values)  # so that only one micro-batch's activations are held
            loss, values = self._gradient(state.flat, arrays)
            total = Gradient(loss, values) if total is None else Gradient(total.loss + loss, total.values + values)
        assert total is not None, "no micro-batch"
        return total

    def update(self, state: State, gradient: Gradient, learning_rate: float) -> Callable[[], StepResult]:
        """Start the update and change `state` in place. Return a function that waits for the result."""
        scalars = mx.array(learning_rate, mx.float32), mx.array(state.step + 1, mx.float32)
        vectors = state.flat, state.first_moment, state.second_moment
        *updated, norm, good = self._update(*vectors, *scalars, gradient.loss, gradient.values)
        state.flat, state.first_moment, state.second_moment = updated
        state.step += 1
        mx.async_eval(*updated, gradient.loss, norm, good)
        return lambda: StepResult(_to_float(gradient.loss), _to_float(norm), bool(good.item()))

    def evaluate(self, flat: mx.array | None, batch: Batch) -> float:
        """Return the loss summed over the batch, with the master weights (P,); None: the loss of the base model."""
        tensors = [] if flat is None else self.layers.split(flat)
        return _to_float(self._loss(tensors, self._arrays(batch, batch.weights)))

    def _arrays(self, batch: Batch, weights: npt.NDArray[np.float32]) -> dict[str, mx.array]:
        check_ids(batch.inputs, batch.targets, self.head.vocab_size)
        arrays = {
            "inputs": batch.inputs,
            "positions": batch.positions,
            "targets": batch.targets,
            "weights": weights,
            "owners": batch.owners,
        }
        if batch.packing is not None:
            arrays |= {"grid": batch.packing.grid, "slots": batch.packing.slots}
        return {name: mx.array(array) for name, array in arrays.items()}

    def _hidden(self, batch: dict[str, mx.array]) -> mx.array:
        """Return the hidden states (N, D) of the supervised positions. Only these are multiplied with the head."""
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

    def _loss_without_gradient(self, tensors: list[mx.array], batch: dict[str, mx.array]) -> mx.array:
        if tensors:
            self.layers.bind(tensors)
        else:
            self.layers.unbind()  # generate() leaves tensors bound, and a trace would capture them as constants
        losses = token_losses(self.head, self._hidden(batch), batch["targets"])
        self.layers.unbind()
        return self._scalar(-losses, batch)

    def _loss_and_gradient(self, flat: mx.array, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        """Return one micro-batch's contribution to the loss, and its gradient (P,), float32."""

        def loss_of(tensors: list[mx.array]) -> mx.array:
            self.layers.bind(tensors, batch["key"])
            with checkpointed(self.model) if self.grad_checkpoint else nullcontext():
                hidden = self._hidden(batch)
            return self._scalar(self.log_probs(hidden, batch["targets"]), batch)

        # With respect to each tensor, not to the vector: the gradient of a slice is a vector as long as all P
        # parameters and mostly zeros, and there would be one for each of 336 slices.
        loss, gradients = mx.value_and_grad(loss_of)(self.layers.split(flat))
        self.layers.unbind()  # the layers must not keep the placeholder arrays of this trace
        return loss, mx.concatenate([gradient.reshape(-1) for gradient in gradients])

    def _scalar(self, log_probs: mx.array, batch: dict[str, mx.array]) -> mx.array:
        return cast(mx.array, self.loss(log_probs, Labels(batch["weights"], batch["owners"])))

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
        """Clip the gradient to MAX_NORM as torch does, and apply AdamW with bias correction and without weight decay.

        All vectors are (P,) float32. If the loss or the norm is not finite, parameters and moments stay unchanged.

        Returns:
            the new masters and moments, the gradient's norm, and whether the update was applied.
        """
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


def _to_float(scalar: mx.array) -> float:
    value = scalar.item()
    assert isinstance(value, float)
    return value
