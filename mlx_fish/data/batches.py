"""Tokens -> Batch: arrays for a step, in an order that is a function of (seed, epoch). Knows nothing of models.

No row is lost. Rows of like length share an update, so that updates cost about the same and little is padding, while a new
permutation each epoch changes which rows meet. A batch lies in one of two ways:

    packed   rows end to end, one sequence of T tokens     A A A A B B C C C C C ·      attention sees them as rows again
    padded   a grid of rows, each filled up                A A A A · / B B · · · / C C C C C
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_fish.data.tokens import Tokens

Int32 = npt.NDArray[np.int32]

# What arrays are filled up to, so that a compiled step meets few shapes. Fillers are never attended to nor labelled.
LENGTH_MULTIPLE = 8
LABEL_MULTIPLE = 16


@dataclass(frozen=True)
class Packing:
    """Where the rows lie in a packed sequence.

    Attributes:
        grid: (R, W) int32, the flat position of each token of each row, -1 behind its end.
        slots: (T,) int32, the place in the flattened grid of each flat position, -1 for a filler.
    """

    grid: Int32
    slots: Int32


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows of input tokens, and N label slots.

    Attributes:
        inputs: packed (1, T), padded (R, W); int32, filled up on the right.
        positions: (N,) int32, indices into the flattened inputs whose next token is supervised.
        targets: (N,) int32, that next token.
        weights: (N,) float32, the share of each label in the loss: 1, and 0 for a slot that only fills the capacity.
        owners: (N,) int32, the row of the batch (from 0) to which each label belongs; 0 for a filler.
        num_tokens: real input tokens, fillers excluded.
        num_supervised: labels.
        rows: `file:line` of each row.
        packing: None for a padded batch.
    """

    inputs: Int32
    positions: Int32
    targets: Int32
    weights: npt.NDArray[np.float32]
    owners: Int32
    num_tokens: int
    num_supervised: int
    rows: tuple[str, ...]
    packing: Packing | None = None

    @property
    def num_computed(self) -> int:
        """Input positions computed, fillers included."""
        return int(self.inputs.size)


@dataclass(frozen=True)
class Capacity:
    """The sizes to which a batch is filled up: flat positions, the longest row, label slots."""

    tokens: int
    width: int
    labels: int

    @classmethod
    def of(cls, batches: Sequence[Sequence[Tokens]]) -> "Capacity":
        """What holds each of these."""
        return cls(
            tokens=round_up(max(num_inputs(rows) for rows in batches), LENGTH_MULTIPLE),
            width=round_up(max(len(row.ids) - 1 for rows in batches for row in rows), LENGTH_MULTIPLE),
            labels=round_up(max(sum(row.num_supervised for row in rows) for rows in batches), LABEL_MULTIPLE),
        )


def make_batch(rows: Sequence[Tokens], *, packing: bool = False, capacity: Capacity | None = None) -> Batch:
    """Shift, lay out and gather: position t predicts id t + 1, so a row of T ids has T - 1 inputs."""
    capacity = capacity or Capacity.of([rows])
    lengths = [len(row.ids) - 1 for row in rows]
    shape = (1, capacity.tokens) if packing else (len(rows), capacity.width)
    starts = np.cumsum([0, *lengths[:-1]]) if packing else capacity.width * np.arange(len(rows))
    inputs = np.zeros(shape, np.int32)
    positions, targets, owners = [], [], []
    for number, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
        inputs.reshape(-1)[start : start + length] = row.ids[:-1]
        labelled = np.flatnonzero(row.supervised[1:])
        positions.append(start + labelled)
        targets.append(row.ids[1:][labelled])
        owners.append(np.full(len(labelled), number, np.int32))
    num_supervised = sum(len(target) for target in targets)
    fill = (0, capacity.labels - num_supervised)
    return Batch(
        inputs=inputs,
        positions=np.pad(np.concatenate(positions).astype(np.int32), fill),
        targets=np.pad(np.concatenate(targets).astype(np.int32), fill),
        weights=np.pad(np.ones(num_supervised, np.float32), fill),
        owners=np.pad(np.concatenate(owners), fill),
        num_tokens=sum(lengths),
        num_supervised=num_supervised,
        rows=tuple(row.where for row in rows),
        packing=_packing(lengths, capacity) if packing else None,
    )


def check_ids(inputs: Int32, targets: Int32, vocab_size: int) -> None:
    """
    Raises:
        ValueError: an id without an embedding, which a loss would clip and a framework might read past its array.
    """
    ids = [int(extreme) for array in (inputs, targets) for extreme in (array.min(), array.max())]
    for wrong in (min(ids), max(ids)):
        if not 0 <= wrong < vocab_size:
            raise ValueError(f"id {wrong} is outside the vocabulary of {vocab_size}")


def _packing(lengths: Sequence[int], capacity: Capacity) -> Packing:
    grid = np.full((len(lengths), capacity.width), -1, np.int32)
    inside = np.arange(capacity.width) < np.array(lengths)[:, None]
    grid[inside] = np.arange(sum(lengths))
    slots = np.full(capacity.tokens, -1, np.int32)
    slots[: sum(lengths)] = np.flatnonzero(inside)
    return Packing(grid, slots)


EVALUATION_TOKENS = 1024  # laid end to end in one evaluation batch: fewer feed a processor badly, more only take memory


def evaluation_rows(rows: Sequence[Tokens]) -> list[list[Tokens]]:
    """The rows of each evaluation batch: every row once, sorted by length, always the same."""
    batches: list[list[Tokens]] = []
    filled = 0
    for row in sorted(rows, key=lambda row: len(row.ids)):
        filled += len(row.ids) - 1
        if not batches or filled > EVALUATION_TOKENS:
            batches.append([])
            filled = len(row.ids) - 1
        batches[-1].append(row)
    return batches


def num_inputs(rows: Sequence[Tokens]) -> int:
    return sum(len(row.ids) - 1 for row in rows)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
