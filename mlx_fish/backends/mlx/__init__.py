"""The MLX backend: Metal on Apple silicon, and the same code on a CPU."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import mlx_fish.backends.mlx.runtime as runtime  # isort: skip
import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_fish.adapters.spec import AdapterSpec, Arrays
from mlx_fish.backends.limits import USABLE_MEMORY
from mlx_fish.backends.mlx.generate import generate, generate_batch
from mlx_fish.backends.mlx.lora import LoraLayers
from mlx_fish.backends.mlx.loss import Head
from mlx_fish.backends.mlx.model import load_model
from mlx_fish.backends.mlx.step import State, Step
from mlx_fish.backends.protocol import Gradient, Sampling, StepResult
from mlx_fish.data.batches import Batch
from mlx_fish.models.folder import ModelFolder
from mlx_fish.objectives.objective import LossFunction, negative_log_likelihood

__all__ = ["Head", "MlxBackend", "runtime"]

# Limit of the freed buffers that MLX keeps for reuse, bytes, so that other programs have memory left.
# On a CPU a larger cache was no faster (docs/performance.md).
CACHE_BYTES = (1 << 30) if runtime.on_gpu else (128 << 20)


def _set_wired_limit() -> None:
    """Keep MLX's arrays resident, so that macOS does not page weights out between two steps.

    The limit is USABLE_MEMORY, the fraction that the memory planner uses too, of the working set that Metal
    recommends; the rest is for the display and other programs. Older systems do not support a wired limit.
    """
    limit = mx.device_info().get("max_recommended_working_set_size")
    if isinstance(limit, int) and limit > 0:
        with contextlib.suppress(ValueError, RuntimeError):
            mx.set_wired_limit(int(USABLE_MEMORY * limit))


class MlxBackend:
    """A base model in MLX with at most one adapter. Implements `mlx_fish.backends.protocol.Backend`."""

    name = "mlx"

    def __init__(self, folder: ModelFolder, notice: Callable[[str], None] = lambda text: None):
        self.device = "Metal" if runtime.on_gpu and mx.metal.is_available() else "gpu" if runtime.on_gpu else "cpu"
        mx.set_cache_limit(CACHE_BYTES)
        if self.device == "Metal":
            _set_wired_limit()
        self.model, dtype = load_model(folder, notice)
        self.dtype = str(dtype).removeprefix("mlx.core.")
        self._activation_dtype = dtype
        self._layers: LoraLayers | None = None
        self._step = Step(self.model, LoraLayers(self.model, AdapterSpec("lora", {}), dtype))  # the base alone
        self._state: State | None = None
        self._enabled = True

    def attach(
        self,
        spec: AdapterSpec,
        arrays: Arrays,
        *,
        loss: LossFunction = negative_log_likelihood,
        grad_checkpoint: bool = False,
    ) -> None:
        if self._layers is not None:
            self._layers.remove(self.model)
        self._layers = LoraLayers(self.model, spec, self._activation_dtype)
        self._step = Step(self.model, self._layers, loss=loss, grad_checkpoint=grad_checkpoint)
        flat = self._layers.flatten(arrays)
        self._state = State(flat, mx.zeros_like(flat), mx.zeros_like(flat))
        mx.eval(self._state.flat, self._state.first_moment, self._state.second_moment)
        self._enabled = True

    def use_adapter(self, enabled: bool) -> None:
        self._enabled = enabled

    def gradient(self, batches: Sequence[Batch], num_supervised: int, dropout_seeds: Sequence[int]) -> Gradient:
        assert self._state is not None, "attach an adapter first"
        return self._step.gradient(self._state, batches, num_supervised, dropout_seeds)

    def update(self, gradient: Gradient, learning_rate: float) -> Callable[[], StepResult]:
        assert self._state is not None, "attach an adapter first"
        return self._step.update(self._state, gradient, learning_rate)

    def evaluate(self, batch: Batch) -> float:
        return self._step.evaluate(self._state.flat if self._state and self._enabled else None, batch)

    def logits(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        self._bind()
        return np.array(self.model(mx.array(ids)[None])[0].astype(mx.float32))

    def adapter_arrays(self) -> Arrays:
        assert self._layers is not None and self._state is not None, "attach an adapter first"
        return self._layers.unflatten(self._state.flat)

    def optimizer_arrays(self) -> Arrays:
        assert self._layers is not None and self._state is not None, "attach an adapter first"
        first = self._layers.unflatten(self._state.first_moment)
        second = self._layers.unflatten(self._state.second_moment)
        return {f"m.{key}": array for key, array in first.items()} | {
            f"v.{key}": array for key, array in second.items()
        }

    def restore_optimizer(self, arrays: Arrays, step: int) -> None:
        assert self._layers is not None and self._state is not None, "attach an adapter first"
        for field, prefix in (("first_moment", "m."), ("second_moment", "v.")):
            named = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            setattr(self._state, field, self._layers.flatten(named))
        self._state.step = step

    def generate(self, prompt: Sequence[int], sampling: Sampling, end_ids: Sequence[int]) -> Iterator[int]:
        self._bind()
        return generate(self.model, prompt, sampling, end_ids)

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, end_ids: Sequence[int]
    ) -> list[list[int]]:
        self._bind()
        return generate_batch(self.model, prompts, sampling, end_ids)

    def peak_memory(self) -> int:
        return int(mx.get_peak_memory())

    def reset_peak_memory(self) -> None:
        mx.reset_peak_memory()

    def _bind(self) -> None:
        """Bind the adapter's current tensors to the LoRA layers, or none while the adapter is disabled."""
        if self._layers is None or self._state is None:
            return
        if self._enabled:
            self._layers.bind(self._layers.split(self._state.flat))
        else:
            self._layers.unbind()
