"""One optimizer update: forward, loss over supervised positions, backward, clip, AdamW."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn

from mlx_fish.adapters.spec import Arrays
from mlx_fish.backends.limits import TORCH_POSITIONS
from mlx_fish.backends.protocol import Gradient, StepResult
from mlx_fish.backends.torch.lora import LoraLayers
from mlx_fish.backends.torch.loss import log_probs
from mlx_fish.data.batches import Batch, Int32, check_ids
from mlx_fish.objectives.objective import Labels, LossFunction, negative_log_likelihood

BETAS, EPSILON, MAX_NORM = (0.9, 0.999), 1e-8, 1.0
_DEVICES = {"cpu": "cpu", "mps": "metal", "cuda": "cuda"}  # torch's name -> ours


@dataclass(frozen=True)
class Piece:
    """Some whole rows of a batch, each cut after its last label.

    Attributes:
        inputs: (B, L), or (1, T) when the rows lie end to end.
        positions: (N,), of each label the flat position whose next token it is.
        targets, weights, owners: (N,), as in `Batch`.
        lengths: of the rows that lie end to end, else None.
    """

    inputs: Int32
    positions: Int32
    targets: Int32
    weights: npt.NDArray[np.float32]
    owners: Int32
    lengths: tuple[int, ...] | None = None


def pieces(batch: Batch, limit: int) -> Iterator[Piece]:
    """Split a batch into pieces of at most `limit` positions, or of one row: the same labels, fewer pads."""
    flat = batch.inputs.reshape(-1)
    starts, ends = _rows(batch)
    labels = batch.weights != 0
    positions, targets, weights, owners = (
        array[labels] for array in (batch.positions, batch.targets, batch.weights, batch.owners)
    )
    columns = positions - starts[owners]
    widths = np.zeros(len(starts), np.int64)
    np.maximum.at(widths, owners, columns + 1)  # under a causal mask, nothing after the last label matters
    packed = batch.packing is not None
    start = 0
    while start < len(widths):
        stop = start + 1
        while stop < len(widths) and _num_positions(widths[start : stop + 1], packed) <= limit:
            stop += 1
        part, inside = widths[start:stop], (owners >= start) & (owners < stop)
        if inside.any():
            width = part.max()
            places = np.cumsum([0, *part[:-1]]) if packed else width * np.arange(stop - start)
            lengths = part if packed else np.minimum(ends - starts, width)[start:stop]
            inputs = np.zeros(part.sum() if packed else width * len(part), np.int32)
            for first, place, length in zip(starts[start:stop], places, lengths, strict=True):
                inputs[place : place + length] = flat[first : first + length]
            yield Piece(
                inputs=inputs.reshape(1 if packed else len(part), -1),
                positions=places[owners[inside] - start] + columns[inside],
                targets=targets[inside],
                weights=weights[inside],
                owners=owners[inside],
                lengths=tuple(part.tolist()) if packed else None,
            )
        start = stop


def _rows(batch: Batch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each row starts and ends in the flattened inputs."""
    if batch.packing is None:
        rows, width = batch.inputs.shape
        return width * np.arange(rows), width * np.arange(1, rows + 1)
    ends = np.cumsum((batch.packing.grid >= 0).sum(axis=1))
    return np.concatenate([[0], ends[:-1]]), ends


def _num_positions(widths: npt.NDArray[np.int64], packed: bool) -> int:
    return int(widths.sum() if packed else len(widths) * widths.max())


def loss_of(model: nn.Module, piece: Piece, loss: LossFunction) -> torch.Tensor:
    """The objective's loss over the piece's labels; a scalar, float32.

    Only the hidden states of labelled positions meet the vocabulary. Pads stand on the right of a causal mask, so padded rows
    need no attention mask; rows that lie end to end need one, and positions that begin at 0 in each.
    """
    head = model.get_output_embeddings().weight
    check_ids(piece.inputs, piece.targets, head.shape[0])
    inputs, positions, targets, owners = (
        torch.from_numpy(array).to(head.device).long()
        for array in (piece.inputs, piece.positions, piece.targets, piece.owners)
    )
    weights = torch.from_numpy(piece.weights).to(head.device)
    rows = {} if piece.lengths is None or len(piece.lengths) == 1 else _end_to_end(piece.lengths, head.device)
    hidden = model.model(input_ids=inputs, use_cache=False, **rows).last_hidden_state
    log_probs_of_targets = log_probs(head, hidden.reshape(-1, hidden.shape[-1])[positions], targets)
    scalar: torch.Tensor = loss(log_probs_of_targets, Labels(weights, owners))
    return scalar


def _end_to_end(lengths: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Positions (1, T) that begin anew in each row, and the mask (1, 1, T, T) that keeps attention inside it."""
    places = torch.cat([torch.arange(length) for length in lengths])
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = (owners[:, None] == owners) & (places[:, None] >= places)
    return {"position_ids": places[None].to(device), "attention_mask": visible[None, None].to(device)}


def evaluate(model: nn.Module, batch: Batch, loss: LossFunction) -> float:
    """The loss summed over the batch's labels."""
    limit = TORCH_POSITIONS[_DEVICES[model.device.type]]
    return sum(loss_of(model, piece, loss).item() for piece in pieces(batch, limit))


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
    """The gradient and the update of one model with one set of LoRA layers, and AdamW's state."""

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
        self.optimizer = torch.optim.AdamW([layers.master], lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=0.0)

    def gradient(self, batches: Sequence[Batch], num_supervised: int, dropout_seeds: Sequence[int]) -> Gradient:
        """The loss of the micro-batches, a float64 scalar, and its gradient (P,) float32, a sum over them."""
        device = self.layers.master.device
        limit = TORCH_POSITIONS[_DEVICES[device.type]]
        total = Gradient(torch.zeros((), dtype=torch.float64, device=device), torch.zeros_like(self.layers.master))
        for batch, seed in zip(batches, dropout_seeds, strict=True):
            with self.layers.dropout(seed), checkpointed(self.model) if self.grad_checkpoint else nullcontext():
                for piece in pieces(batch, limit):
                    weights = piece.weights / np.float32(num_supervised)
                    share = loss_of(self.model, replace(piece, weights=weights), self.loss)
                    total.values.add_(self.layers.gradient(share))
                    total.loss.add_(share.detach().double())  # read once an update: reading waits for a GPU
        return total

    def update(self, gradient: Gradient, learning_rate: float) -> Callable[[], StepResult]:
        """Make the update; nothing moves if the loss or the gradient's norm is not finite."""
        self.layers.master.grad = gradient.values
        norm = torch.nn.utils.clip_grad_norm_(self.layers.master, MAX_NORM).item()
        loss = gradient.loss.item()
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
