"""The border between the shared code and a framework: int32 arrays and Python floats go in, floats and float32 arrays come out.

Only `backends/mlx/` imports mlx, only `backends/torch.py` imports torch.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mlx_fish.adapter import Arrays, LoraSpec
from mlx_fish.batches import Batch
from mlx_fish.errors import FishError
from mlx_fish.model_folder import ModelFolder


@dataclass(frozen=True)
class StepResult:
    """What an optimizer update found: the mean loss over the update's supervised tokens, and the gradient's global norm.

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

    def attach(self, spec: LoraSpec, arrays: Arrays, *, grad_checkpoint: bool = False) -> None:
        """Put LoRA with these values on the base, and zero optimizer moments.

        With `grad_checkpoint` a block's activations are computed again in the backward pass instead of being kept.
        """
        ...

    def use_adapter(self, enabled: bool) -> None:
        """Switch the adapter off, to compute the base model, and on again."""
        ...

    def step(
        self, batches: Sequence[Batch], learning_rate: float, dropout_seeds: Sequence[int]
    ) -> Callable[[], StepResult]:
        """Start one optimizer update over the micro-batches; the call returned waits for its result.

        The gradient is that of the summed loss over the update's supervised tokens, clipped to norm 1, applied by AdamW.
        """
        ...

    def evaluate(self, batch: Batch) -> float:
        """Summed cross-entropy (nats, float32) over the batch's supervised tokens, without dropout."""
        ...

    def logits(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """(T,) ids -> (T, vocabulary) float32 logits."""
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
        """Bytes held at the most since `reset_peak_memory`, the weights included."""
        ...

    def reset_peak_memory(self) -> None: ...


def load_backend(folder: ModelFolder, notice: Callable[[str], None] = lambda text: None) -> Backend:
    """Load the model with the framework of this machine.

    Args:
        notice: takes a sentence for the person when something is not as fast or as exact as it could be.
    """
    if not _installed("mlx"):  # found, not imported: OpenBLAS must be loaded first
        raise FishError(
            'MLX is not installed; run `pip install "mlx-fish[mlx]"` (on Apple silicon: `pip install mlx`).'
        )
    from mlx_fish.backends.mlx import MlxBackend

    return MlxBackend(folder, notice)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a framework failed for want of memory, where it can say so (Metal ends the process instead)."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in words or "unable to allocate" in words


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
