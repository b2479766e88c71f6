"""The torch backend: the model from transformers, LoRA layers from PEFT, on CUDA, Metal or a CPU."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from mlx_fish.adapters.spec import AdapterSpec, Arrays
from mlx_fish.backends.protocol import Gradient, Sampling, StepResult
from mlx_fish.backends.torch import memory
from mlx_fish.backends.torch.generate import generate, generate_batch
from mlx_fish.backends.torch.lora import LoraLayers
from mlx_fish.backends.torch.model import choose_device, load_model
from mlx_fish.backends.torch.step import Step, evaluate
from mlx_fish.data.batches import Batch
from mlx_fish.errors import FishError
from mlx_fish.models.folder import ModelFolder
from mlx_fish.objectives.objective import LossFunction, negative_log_likelihood

__all__ = ["TorchBackend"]


class TorchBackend:
    """A base model in torch with at most one adapter. Implements `mlx_fish.backends.protocol.Backend`."""

    name = "torch"

    def __init__(self, folder: ModelFolder):
        self._device = choose_device()
        self.device = self._device.type
        self.model = load_model(folder, self._device)
        self.dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        self._layers: LoraLayers | None = None
        self._step: Step | None = None

    def attach(
        self,
        spec: AdapterSpec,
        arrays: Arrays,
        *,
        loss: LossFunction = negative_log_likelihood,
        grad_checkpoint: bool = False,
    ) -> None:
        if grad_checkpoint and spec.dropout:
            raise FishError(
                "--grad-checkpoint with --lora-dropout does not work with torch, since a recomputed block would draw "
                "different dropout masks; use only one of them."
            )
        if self._layers is not None:
            self._layers.remove()
        self._layers = LoraLayers(self.model, spec, arrays)
        self._step = Step(self.model, self._layers, loss=loss, grad_checkpoint=grad_checkpoint)

    def use_adapter(self, enabled: bool) -> None:
        if self._layers is not None:
            self._layers.enable(enabled)

    def gradient(self, batches: Sequence[Batch], num_supervised: int, dropout_seeds: Sequence[int]) -> Gradient:
        assert self._step is not None, "attach an adapter first"
        return self._step.gradient(batches, num_supervised, dropout_seeds)

    def update(self, gradient: Gradient, learning_rate: float) -> Callable[[], StepResult]:
        assert self._step is not None, "attach an adapter first"
        return self._step.update(gradient, learning_rate)

    @torch.inference_mode()
    def evaluate(self, batch: Batch) -> float:
        return evaluate(self.model, batch, self._step.loss if self._step else negative_log_likelihood)

    @torch.inference_mode()
    def logits(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        inputs = torch.from_numpy(ids[None]).to(self._device).long()
        logits: npt.NDArray[np.float32] = self.model(inputs, use_cache=False).logits[0].float().cpu().numpy()
        return logits

    def adapter_arrays(self) -> Arrays:
        assert self._layers is not None, "attach an adapter first"
        return self._layers.unflatten(self._layers.master)

    def optimizer_arrays(self) -> Arrays:
        assert self._step is not None, "attach an adapter first"
        return self._step.moments()

    def restore_optimizer(self, arrays: Arrays, step: int) -> None:
        assert self._step is not None, "attach an adapter first"
        self._step.restore(arrays, step)

    def generate(self, prompt: Sequence[int], sampling: Sampling, end_ids: Sequence[int]) -> Iterator[int]:
        return generate(self.model, prompt, sampling, end_ids)

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, end_ids: Sequence[int]
    ) -> list[list[int]]:
        return generate_batch(self.model, prompts, sampling, end_ids)

    def peak_memory(self) -> int:
        return memory.peak(self._device)

    def reset_peak_memory(self) -> None:
        memory.reset(self._device)
