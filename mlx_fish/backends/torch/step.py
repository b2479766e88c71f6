"""One optimizer update: forward, loss over supervised positions, backward, clip, AdamW."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

from mlx_fish.adapter import Arrays
from mlx_fish.backends import StepResult
from mlx_fish.backends.torch.lora import LoraLayers
from mlx_fish.backends.torch.loss import losses
from mlx_fish.batches import Batch, Int32

BETAS, EPSILON, MAX_NORM = (0.9, 0.999), 1e-8, 1.0


# Positions computed at a time. Activations grow with it, the gradient's sum does not change. A CPU gains 7 % from twice
# as many, for a gigabyte (docs/results.md); a GPU would idle with fewer.
POSITIONS_AT_A_TIME = {"cpu": 256, "mps": 4096, "cuda": 8192}


@dataclass(frozen=True)
class Piece:
    """Some rows of a batch, cut after their last label: inputs (B, L), and of each label its flat position and target (N,)."""

    inputs: Int32
    positions: Int32
    targets: Int32


def pieces(batch: Batch, limit: int) -> Iterator[Piece]:
    """Split a batch into pieces of at most `limit` positions, or of one row: the same labels, fewer pads."""
    labels = batch.weights > 0
    rows, columns = np.divmod(batch.positions[labels], batch.inputs.shape[1])
    targets = batch.targets[labels]
    ends = np.zeros(len(batch.inputs), np.int32)
    np.maximum.at(ends, rows, columns + 1)  # under a causal mask, nothing after the last label matters
    start = 0
    while start < len(ends):
        stop = start + 1
        while stop < len(ends) and (stop + 1 - start) * ends[start : stop + 1].max() <= limit:
            stop += 1
        width = int(ends[start:stop].max())
        inside = (rows >= start) & (rows < stop)
        if inside.any():
            flat = (rows[inside] - start) * width + columns[inside]
            yield Piece(batch.inputs[start:stop, :width], flat, targets[inside])
        start = stop


def summed_loss(model: nn.Module, piece: Piece) -> torch.Tensor:
    """The cross-entropy summed over the piece's labels; a scalar, float32.

    Only the hidden states of labelled positions meet the vocabulary. Pads stand on the right of a causal mask, so no
    attention mask is needed.
    """
    head = model.get_output_embeddings().weight
    most = max(int(piece.targets.max()), int(piece.inputs.max()))
    assert 0 <= most < head.shape[0], f"id {most} is outside the vocabulary of {head.shape[0]}"
    inputs, positions, targets = (
        torch.from_numpy(array).to(head.device).long() for array in (piece.inputs, piece.positions, piece.targets)
    )
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return losses(head, hidden.reshape(-1, hidden.shape[-1])[positions], targets).sum()


def evaluate(model: nn.Module, batch: Batch) -> float:
    """The cross-entropy summed over the batch's labels."""
    limit = POSITIONS_AT_A_TIME[model.device.type]
    return sum(summed_loss(model, piece).item() for piece in pieces(batch, limit))


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Within the block of a `with`, transformer blocks keep their input alone and are computed again in the backward pass."""
    blocks = model.model.layers
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in blocks:
        block.training = True  # transformers asks the block alone; what lies inside stays without dropout of its own
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
        model.gradient_checkpointing_disable()


class Step:
    """The update of one model with one set of LoRA layers, and AdamW's state."""

    def __init__(self, model: nn.Module, layers: LoraLayers, *, grad_checkpoint: bool = False):
        self.model = model
        self.layers = layers
        self.grad_checkpoint = grad_checkpoint
        self.optimizer = torch.optim.AdamW([layers.master], lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=0.0)

    def __call__(
        self, batches: Sequence[Batch], learning_rate: float, dropout_seeds: Sequence[int]
    ) -> Callable[[], StepResult]:
        """Make the update; nothing moves if the loss or the gradient's norm is not finite."""
        num_supervised = sum(batch.num_supervised for batch in batches)  # the whole update's: never a mean of means
        limit = POSITIONS_AT_A_TIME[self.layers.master.device.type]
        loss, gradient = 0.0, torch.zeros_like(self.layers.master)
        for batch, seed in zip(batches, dropout_seeds, strict=True):
            with self.layers.dropout(seed), checkpointed(self.model) if self.grad_checkpoint else nullcontext():
                for piece in pieces(batch, limit):
                    share = summed_loss(self.model, piece) / num_supervised
                    gradient += self.layers.gradient(share)
                    loss += share.item()
        self.layers.master.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.layers.master, MAX_NORM).item()
        updated = bool(np.isfinite(loss) and np.isfinite(norm))
        if updated:
            self.optimizer.param_groups[0]["lr"] = learning_rate
            self.optimizer.step()
            self.layers.refresh()
        self.layers.master.grad = None
        return lambda: StepResult(loss, norm, updated)

    def moments(self) -> Arrays:
        """AdamW's moments under `m.<key>` and `v.<key>`: zero before the first update."""
        state = self.optimizer.state[self.layers.master]
        found = {}
        for prefix, name in (("m.", "exp_avg"), ("v.", "exp_avg_sq")):
            flat = state[name] if state else torch.zeros_like(self.layers.master)
            found.update({prefix + key: array for key, array in self.layers.unflatten(flat).items()})
        return found

    def restore(self, arrays: Arrays, step: int) -> None:
        """Continue from these moments after `step` updates."""
        state: dict[str, torch.Tensor] = {"step": torch.tensor(float(step))}
        for prefix, name in (("m.", "exp_avg"), ("v.", "exp_avg_sq")):
            named = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            state[name] = self.layers.flatten(named).to(self.layers.master.device)
        self.optimizer.state[self.layers.master] = state
