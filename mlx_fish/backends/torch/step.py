"""Compute one optimizer update: forward, loss over the supervised positions, backward, clipping, AdamW.

A batch is computed in pieces of a few complete rows, to limit the memory of activations.
"""

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
_DEVICES = {"cpu": "cpu", "mps": "metal", "cuda": "cuda"}  # torch's device type -> key of TORCH_POSITIONS


@dataclass(frozen=True)
class Piece:
    """Some complete rows of a batch, each truncated after its last label.

    Attributes:
        inputs: (B, L) int32 for padded rows, (1, T) for packed rows.
        positions: (N,) int32, for each label the index into the flattened inputs of the token before it.
        targets, weights, owners: (N,), as in `Batch`.
        lengths: the lengths of packed rows; None for padded rows.
    """

    inputs: Int32
    positions: Int32
    targets: Int32
    weights: npt.NDArray[np.float32]
    owners: Int32
    lengths: tuple[int, ...] | None = None


def pieces(batch: Batch, limit: int) -> Iterator[Piece]:
    """Split a batch into pieces of at most `limit` positions, or of one row if that is longer.

    Together the pieces have the labels of the batch, with less padding.
    """
    flat = batch.inputs.reshape(-1)
    starts, ends = _rows(batch)
    labels = batch.weights != 0
    positions, targets, weights, owners = (
        array[labels] for array in (batch.positions, batch.targets, batch.weights, batch.owners)
    )
    columns = positions - starts[owners]
    widths = np.zeros(len(starts), np.int64)
    np.maximum.at(widths, owners, columns + 1)  # under a causal mask, tokens after the last label have no effect
    packed = batch.packing is not None
    start = 0
    while start < len(widths):
        stop = start + 1
        while stop < len(widths) and _num_positions(widths[start : stop + 1], packed) <= limit:
            stop += 1
        piece_widths, in_piece = widths[start:stop], (owners >= start) & (owners < stop)
        if in_piece.any():
            width = piece_widths.max()
            offsets = np.cumsum([0, *piece_widths[:-1]]) if packed else width * np.arange(stop - start)
            lengths = piece_widths if packed else np.minimum(ends - starts, width)[start:stop]
            inputs = np.zeros(piece_widths.sum() if packed else width * len(piece_widths), np.int32)
            for first, offset, length in zip(starts[start:stop], offsets, lengths, strict=True):
                inputs[offset : offset + length] = flat[first : first + length]
            yield Piece(
                inputs=inputs.reshape(1 if packed else len(piece_widths), -1),
                positions=offsets[owners[in_piece] - start] + columns[in_piece],
                targets=targets[in_piece],
                weights=weights[in_piece],
                owners=owners[in_piece],
                lengths=tuple(piece_widths.tolist()) if packed else None,
            )
        start = stop


def _rows(batch: Batch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the start and the end of each row in the flattened inputs, (R,) each."""
    if batch.packing is None:
        rows, width = batch.inputs.shape
        return width * np.arange(rows), width * np.arange(1, rows + 1)
    ends = np.cumsum((batch.packing.grid >= 0).sum(axis=1))
    return np.concatenate([[0], ends[:-1]]), ends


def _num_positions(widths: npt.NDArray[np.int64], packed: bool) -> int:
    """Return the number of positions of a piece, padding included, from the widths of its rows (B,)."""
    return int(widths.sum() if packed else len(widths) * widths.max())


def loss_of(model: nn.Module, piece: Piece, loss: LossFunction) -> torch.Tensor:
    """Return the objective's loss over the piece's labels, a float32 scalar.

    Only the hidden states of supervised positions are multiplied with the head. Padding is on the right, where
    no earlier token attends, so padded rows need no attention mask. Packed rows need one, and positions that start at
    0 in each row.
    """
    head = model.get_output_embeddings().weight
    check_ids(piece.inputs, piece.targets, head.shape[0])
    inputs, positions, targets, owners = (
        torch.from_numpy(array).to(head.device).long()
        for array in (piece.inputs, piece.positions, piece.targets, piece.owners)
    )
    weights = torch.from_numpy(piece.weights).to(head.device)
    layout = {} if piece.lengths is None or len(piece.lengths) == 1 else _packed_layout(piece.lengths, head.device)
    hidden = model.model(input_ids=inputs, use_cache=False, **layout).last_hidden_state
    log_probs_of_targets = log_probs(head, hidden.reshape(-1, hidden.shape[-1])[positions], targets)
    scalar: torch.Tensor = loss(log_probs_of_targets, Labels(weights, owners))
    return scalar


def _packed_layout(lengths: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Return transformers' arguments for packed rows: positions and attention mask.

    The positions (1, T) start at 0 in each row. The mask (1, 1, T, T) is causal and limits attention to the row.
    """
    positions = torch.cat([torch.arange(length) for length in lengths])
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = (owners[:, None] == owners) & (positions[:, None] >= positions)
    return {"position_ids": positions[None].to(device), "attention_mask": visible[None, None].to(device)}


def evaluate(model: nn.Module, batch: Batch, loss: LossFunction) -> float:
    """Return the loss summed over the batch's labels."""
    limit = TORCH_POSITIONS[_DEVICES[model.device.type]]
    return sum(loss_of(model, piece, loss).item() for piece in pieces(batch, limit))


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint the model's transformer blocks inside a `with` statement.

    A checkpointed block stores only its input and is recomputed in the backward pass.
    """
    blocks = model.model.layers
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in blocks:  # transformers reads only the block's flag; its modules stay in eval mode, without dropout
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
        model.gradient_checkpointing_disable()


class Step:
    """The gradient and the update of one model with one set of LoRA layers, with AdamW's state."""

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
        """Return the loss, a float64 scalar, and the gradient, (P,) float32, summed over the micro-batches."""
        device = self.layers.master.device
        limit = TORCH_POSITIONS[_DEVICES[device.type]]
        total = Gradient(torch.zeros((), dtype=torch.float64, device=device), torch.zeros_like(self.layers.master))
        for batch, seed in zip(batches, dropout_seeds, strict=True):
            with self.layers.dropout(seed), checkpointed(self.model) if self.grad_checkpoint else nullcontext():
                for piece in pieces(batch, limit):
                    weights = piece.weights / np.float32(num_supervised)
                    loss = loss_of(self.model, replace(piece, weights=weights), self.loss)
                    total.values.add_(self.layers.gradient(loss))
                    total.loss.add_(loss.detach().double())  # no .item() here: it would wait for the GPU
        return total

    def update(self, gradient: Gradient, learning_rate: float) -> Callable[[], StepResult]:
        """Clip the gradient and apply AdamW, unless the loss or the gradient's norm is not finite.

        Returns:
            a function that returns the result; the update is complete before that.
        """
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
        """Return AdamW's moments under `m.<key>` and `v.<key>`, float32; zeros before the first update."""
        state = self.optimizer.state[self.layers.master]
        arrays = {}
        for prefix, name in (("m.", "exp_avg"), ("v.", "exp_avg_sq")):
            flat = state[name] if state else torch.zeros_like(self.layers.master)
            arrays.update({prefix + key: array for key, array in self.layers.unflatten(flat).items()})
        return arrays

    def restore(self, arrays: Arrays, step: int) -> None:
        """Restore AdamW's moments, as returned by `moments`, and the number of updates done."""
        state: dict[str, torch.Tensor] = {"step": torch.tensor(float(step))}
        for prefix, name in (("m.", "exp_avg"), ("v.", "exp_avg_sq")):
            named = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            state[name] = self.layers.flatten(named).to(self.layers.master.device)
        self.optimizer.state[self.layers.master] = state
