"""What a backend must offer: int32 arrays and Python floats go in, floats and float32 arrays come out. Imports no framework."""

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
    """The sums of one update so far, in the framework's own arrays.

    Attributes:
        loss: scalar; every label's share is divided by the labels of the whole update already.
        values: (P,) float32, the gradient to the flat vector of trainable numbers.
    """

    loss: Any
    values: Any


@dataclass(frozen=True)
class StepResult:
    """The outcome of an optimizer update: the mean loss over its supervised tokens, and the gradient's global norm.

    `updated` is False when either was not finite; then nothing was changed.
    """

    loss: float
    grad_norm: float
    updated: bool


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, as in transformers: the penalty first, then temperature, top-k, top-p. Temperature 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42


class Backend(Protocol):
    """One model in one framework. A fresh backend holds the base model; `attach` puts an adapter on it."""

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
        """Put an adapter with these values on the base, and zero optimizer moments.

        Args:
            loss: what `gradient` and `evaluate` compute from the labels' log-probabilities.
            grad_checkpoint: compute a block's activations again in the backward pass instead of keeping them.
        """
        ...

    def use_adapter(self, enabled: bool) -> None:
        """Switch the adapter off, to compute the base model, and on again."""
        ...

    def gradient(self, batches: Sequence[Batch], num_supervised: int, dropout_seeds: Sequence[int]) -> Gradient:
        """Start to compute the loss of these micro-batches, and its gradient.

        Args:
            num_supervised: the labels of the whole update, by which every label's share is divided: of all micro-batches and
                of all processes, so that sums are divided once, never a mean of means.
            dropout_seeds: one for each micro-batch.
        """
        ...

    def update(self, gradient: Gradient, learning_rate: float) -> Callable[[], StepResult]:
        """Start one optimizer update, clipped to norm 1 and applied by AdamW; the call returned waits for its result."""
        ...

    def evaluate(self, batch: Batch) -> float:
        """The loss summed over the batch's supervised tokens (nats for cross-entropy), without dropout."""
        ...

    def logits(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """(T,) ids -> (T, V) float32 logits."""
        ...

    def adapter_arrays(self) -> Arrays:
        """The adapter's values under PEFT's keys, float32."""
        ...

    def optimizer_arrays(self) -> Arrays:
        """AdamW's moments: `m.<key>` and `v.<key>` for each key of `adapter_arrays`."""
        ...

    def restore_optimizer(self, arrays: Arrays, step: int) -> None:
        """Continue from these moments after `step` updates."""
        ...

    def generate(self, prompt: Sequence[int], sampling: Sampling, end_ids: Sequence[int]) -> Iterator[int]:
        """Yield ids one by one, up to and without the first end id."""
        ...

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, end_ids: Sequence[int]
    ) -> list[list[int]]:
        """Continue many prompts at once; the answers in the prompts' order, end ids left out."""
        ...

    def peak_memory(self) -> int:
        """The most bytes held since `reset_peak_memory`, the weights included."""
        ...

    def reset_peak_memory(self) -> None: ...


@dataclass(frozen=True)
class World:
    """The processes that train together: this one's number, and how many there are. Alone, every sum is its own."""

    rank: int = 0
    size: int = 1

    def all_sum(self, gradient: Gradient) -> Gradient:
        """The gradient summed over all processes."""
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
    """Start one whole update over the micro-batches: gradient, sum over all processes, update; the call returned waits."""
    num_supervised = sum(batch.num_supervised for batch in batches)
    gradient = backend.gradient(batches, num_supervised, dropout_seeds)
    return backend.update(world.all_sum(gradient), learning_rate)
