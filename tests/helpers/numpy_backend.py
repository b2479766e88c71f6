"""A backend of a few lines of NumPy: deterministic, instant, and safe to fork. For tests of the loop, the folder and the signals."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mlx_fish.adapters.spec import AdapterSpec, Arrays
from mlx_fish.backends.protocol import Gradient, Sampling, StepResult
from mlx_fish.data.batches import Batch


class NumpyBackend:
    """Each update moves every number by what (batch, dropout seed, moments) hash to, so any slip in resuming shows.

    `during_step` and `during_evaluate` are called in the middle of the work, to send signals or to fail there.
    """

    name, device, dtype = "numpy", "cpu", "float32"

    def __init__(self) -> None:
        self.during_step: Callable[[int], None] = lambda step: None
        self.during_evaluate: Callable[[], None] = lambda: None
        self.loss = lambda value: value
        self._step = 0

    def attach(self, spec: AdapterSpec, arrays: Arrays, *, loss: Any = None, grad_checkpoint: bool = False) -> None:
        self._arrays = {name: array.copy() for name, array in arrays.items()}
        self._first = {name: np.zeros_like(array) for name, array in arrays.items()}
        self._second = {name: np.zeros_like(array) for name, array in arrays.items()}
        self._step = 0

    def gradient(self, batches: Sequence[Batch], num_supervised: int, dropout_seeds: Sequence[int]) -> Gradient:
        self.during_step(self._step + 1)
        digest = hashlib.sha256(repr((dropout_seeds, num_supervised, self._step)).encode())
        for batch in batches:
            digest.update(batch.inputs.tobytes() + batch.targets.tobytes())
        return Gradient(0.0, digest)

    def update(self, gradient: Gradient, learning_rate: float) -> Callable[[], StepResult]:
        digest = gradient.values
        digest.update(repr(learning_rate).encode())
        push = np.float32(int.from_bytes(digest.digest()[:4], "little") / 2**32 - 0.5)
        for name, array in self._arrays.items():
            self._first[name] = np.float32(0.9) * self._first[name] + push
            self._second[name] = np.float32(0.99) * self._second[name] + push * push
            array += np.float32(learning_rate) * self._first[name] / (np.sqrt(self._second[name]) + np.float32(1))
        self._step += 1
        loss = self.loss(float(np.abs(next(iter(self._arrays.values()))).mean()) + float(abs(push)))
        return lambda: StepResult(loss, 1.0, bool(np.isfinite(loss)))

    def evaluate(self, batch: Batch) -> float:
        self.during_evaluate()
        return float(np.abs(next(iter(self._arrays.values()))).sum()) * batch.num_supervised

    def adapter_arrays(self) -> Arrays:
        return {name: array.copy() for name, array in self._arrays.items()}

    def optimizer_arrays(self) -> Arrays:
        return {f"m.{name}": array for name, array in self._first.items()} | {
            f"v.{name}": array for name, array in self._second.items()
        }

    def restore_optimizer(self, arrays: Arrays, step: int) -> None:
        for name in self._arrays:
            self._first[name], self._second[name] = arrays[f"m.{name}"].copy(), arrays[f"v.{name}"].copy()
        self._step = step

    def generate(self, prompt: Sequence[int], sampling: Sampling, end_ids: Sequence[int]) -> Iterator[int]:
        return iter(prompt[:4])

    def use_adapter(self, enabled: bool) -> None: ...

    def peak_memory(self) -> int:
        return 1

    def reset_peak_memory(self) -> None: ...
