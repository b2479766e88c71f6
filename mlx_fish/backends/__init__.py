"""The border between the shared code and a framework: int32 arrays and Python floats go in, floats and float32 arrays come out.

Only `backends/mlx/` imports mlx, only `backends/torch/` imports torch.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mlx_fish.adapter import Arrays, LoraSpec
from mlx_fish.batches import Batch
from mlx_fish.blas import load_openblas
from mlx_fish.config import BACKENDS
from mlx_fish.errors import FishError, did_you_mean
from mlx_fish.model_folder import ModelFolder

VARIABLE = "MLX_FISH_BACKEND"
PACKAGES = {"mlx": ("mlx", "mlx_lm"), "torch": ("torch", "peft")}
INSTALL = {"mlx": 'pip install "mlx-fish[mlx]"', "torch": 'pip install "mlx-fish[torch]"'}
# Architectures whose seam (normed hidden states, then one linear head) was tested against the whole model.
ARCHITECTURES = ("qwen2", "llama")


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


def choose_backend(name: str = "auto") -> str:
    """The framework to compute with, `mlx` or `torch`. Looks for packages, and imports none.

    To be called before anything imports transformers, which imports mlx when it is installed: MLX wants OpenBLAS to be there
    first. torch does not want it at all: it would multiply with OpenBLAS too, whose threads and torch's own then wait for each
    other (measured on two cores: steps of 0.05 s became 0.1 to 1.8 s).

    Args:
        name: what was asked for. `auto` is what MLX_FISH_BACKEND says, else MLX on Apple silicon and torch elsewhere, else the
            other one.

    Raises:
        FishError: no such backend, or it is not installed.
    """
    chosen = _choose(name)
    if chosen == "mlx":
        load_openblas()
    return chosen


def _choose(name: str) -> str:
    asked = "--backend"
    if name == "auto":
        asked, name = VARIABLE, os.environ.get(VARIABLE) or "auto"
    if name not in BACKENDS:
        raise FishError(f"{asked} {name}: expected one of {', '.join(BACKENDS)}.{did_you_mean(name, BACKENDS)}")
    if name != "auto":
        if not _installed(name):
            raise FishError(f"{asked} {name}: {name} is not installed; run `{INSTALL[name]}`.")
        return name
    on_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    for candidate in ("mlx", "torch") if on_apple_silicon else ("torch", "mlx"):
        if _installed(candidate):
            return candidate
    wanted = "mlx" if on_apple_silicon else "torch"
    raise FishError(f"neither MLX nor torch with PEFT is installed; run `{INSTALL[wanted]}`.")


def load_backend(
    folder: ModelFolder, notice: Callable[[str], None] = lambda text: None, *, name: str = "auto"
) -> Backend:
    """Load the model.

    Args:
        notice: takes a sentence for the person when something is not as fast or as exact as it could be.
        name: see `choose_backend`.

    Raises:
        FishError: also when the model is of an architecture that was not tested.
    """
    chosen = choose_backend(name)
    model_type = folder.config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise FishError(f"{folder.name} is a {model_type} model; mlx-fish trains {' and '.join(ARCHITECTURES)} models.")
    if chosen == "torch":
        from mlx_fish.backends.torch import TorchBackend

        return TorchBackend(folder)
    from mlx_fish.backends.mlx import MlxBackend

    return MlxBackend(folder, notice)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a framework failed for want of memory, where it can say so.

    Metal raises for one buffer that is too large or for too many of them; when the GPU runs out in the middle of its work the
    process ends without a word.
    """
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(said in words for said in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("out of memory", "unable to allocate", "[metal::malloc]")


def _installed(backend: str) -> bool:
    # Found, not imported: OpenBLAS must be loaded before MLX is.
    return all(importlib.util.find_spec(package) is not None for package in PACKAGES[backend])
