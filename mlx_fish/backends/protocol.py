"""Define the backend protocol: the interface between training, evaluation and generation and one framework.

Inputs are NumPy int32 arrays and Python numbers, outputs Python floats and NumPy float32 arrays. Imports no framework.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mlx_fish.adapters.spec import AdapterSpec, Arrays
from mlx_fish.data.batches import Batch
from mlx_fish.objectives.objective import LossFunction, negative_log_likelihood


@dataclass(frozen=True)
class Gradient:
    """Loss and gradient of one update, summed over its micro-batches, as arrays of the framework.

    Attributes:
        loss: scalar, already divided by the number of labels in the whole update.
        values: (P,) float32, the gradient with respect to the flat vector of trainable parameters.
    """

    loss: Any
    values: Any


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer update.

    Attributes:
        loss: mean loss over the supervised tokens of the update (nats for cross-entropy).
        grad_norm: global L2 norm of the gradient before clipping.
        updated: False if the loss or the norm was not finite; then no parameter or moment was changed.
    """

    loss: float
    grad_norm: float
    updated: bool


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, with the same meaning as in transformers.

    They apply in this order: repetition penalty, temperature, top-k, top-p. Temperature 0 is greedy decoding.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42


class Backend(Protocol):
    """One model in one framework. A new backend holds the base model; `attach` adds an adapter.

    Attributes:
        name: `mlx` or `torch`.
        device: name of the device, as shown to the user.
        dtype: dtype of the activations, such as `bfloat16`.
    """

    name: str
    device: str
    dtype: str

    def attach(
        self,
        spec: AdapterSpec,
        arrays: Arrays,
        *,
        loss: LossFunction = negative_log_likelihood,
        grad_checkpoint: bool = False,
    ) -> None:
        """Add an adapter to the base in place of any earlier one, and set the optimizer's moments to zero.

        Args:
            spec: the adapted layers, their ranks and scales.
            arrays: initial values of the adapter's tensors, float32, under PEFT's keys.
            loss: computes the loss of `gradient` and `evaluate` from the labels' log-probabilities.
            grad_checkpoint: recompute each block's activations in the backward pass instead of storing them.
        """
        ...

    def use_adapter(self, enabled: bool) -> None:
        """Enable or disable the adapter. While it is disabled, the backend computes the base model."""
        ...

    def gradient(self, batches: Sequence[Batch], num_supervised: int, dropout_seeds: Sequence[int]) -> Gradient:
        """Start to compute the loss of these micro-batches and its gradient.

        Args:
            batches: the micro-batches.
            num_supervised: number of labels in the whole update, over all micro-batches and all processes. The loss
                of each label is divided by it, so sums are divided once and no mean of means arises.
            dropout_seeds: one seed for each micro-batch.
        """
        ...

    def update(self, gradient: Gradient, learning_rate: float) -> Callable[[], StepResult]:
        """Start one update: clip the gradient to norm 1 and apply AdamW.

        Returns:
            a function that waits for the update and returns its result.
        """
        ...

    def evaluate(self, batch: Batch) -> float:
        """Return the loss summed over the batch's supervised tokens (nats for cross-entropy), without dropout."""
        ...

    def logits(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Return the logits (T, V), float32, of one sequence of token ids (T,)."""
        ...

    def adapter_arrays(self) -> Arrays:
        """Return the adapter's tensors under PEFT's keys, float32."""
        ...

    def optimizer_arrays(self) -> Arrays:
        """Return AdamW's moments: `m.<key>` and `v.<key>` for each key of `adapter_arrays`, float32."""
        ...

    def restore_optimizer(self, arrays: Arrays, step: int) -> None:
        """Restore AdamW's moments, as returned by `optimizer_arrays`, and the number of updates done."""
        ...

    def generate(self, prompt: Sequence[int], sampling: Sampling, end_ids: Sequence[int]) -> Iterator[int]:
        """Yield the token ids of one answer. Stops at the first end id and does not yield it."""
        ...

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, end_ids: Sequence[int]
    ) -> list[list[int]]:
        """Return the token ids of one answer per prompt, in the order of the prompts, without end ids."""
        ...

    def peak_memory(self) -> int:
        """Return the peak memory since `reset_peak_memory`, weights included, in bytes."""
        ...

    def reset_peak_memory(self) -> None:
        """Start a new measurement of peak memory."""
        ...


@dataclass(frozen=True)
class World:
    """The group of training processes. With one process, `all_sum` returns its argument.

    Attributes:
        rank: index of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def all_sum(self, gradient: Gradient) -> Gradient:
        """Return the gradient summed over all processes."""
        assert self.size == 1
        return gradient


ALONE = World()


def optimizer_step(
    backend: Backend,
    batches: Sequence[Batch],
    learning_rate: float,
    dropout_seeds: Sequence[int],
    world: World = ALONE,
) -> Callable[[], StepResult]:
    """Start one optimizer update: compute the gradient of the micro-batches, sum it over all processes, and apply it.

    Returns:
        a function that waits for the update and returns its result.
    """
    num_supervised = sum(batch.num_supervised for batch in batches)
    gradient = backend.gradient(batches, num_supervised, dropout_seeds)
    return backend.update(world.all_sum(gradient), learning_rate)
