"""Lay tokenised rows out as the arrays of one micro-batch, packed or padded. Independent of models.

    packed   rows end to end, one sequence of T tokens   A A A A B B C C C C C ·   attention separates the rows
    padded   a grid of rows, padded to equal length      A A A A · / B B · · · / C C C C C

`mlx_fish.data.order` decides which rows share a micro-batch and in which order micro-batches are trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_fish.data.tokens import Tokens

Int32 = npt.NDArray[np.int32]

# Array sizes are padded to these multiples, so that a compiled step sees few shapes. Padding is never
# attended to and never supervised.
LENGTH_MULTIPLE = 8
LABEL_MULTIPLE = 16


@dataclass(frozen=True)
class Packing:
    """The layout of R rows, at most W tokens each, in a packed sequence of T positions.

    Attributes:
        grid: (R, W) int32, the index in the packed sequence of each token of each row, -1 for padding.
        slots: (T,) int32, the index in the flattened grid of each position of the packed sequence, -1 for
            padding.
    """

    grid: Int32
    slots: Int32


@dataclass(frozen=True)
class Batch:
    """One micro-batch: R rows of input tokens, and N labels including padding.

    Attributes:
        inputs: (1, T) if packed, (R, W) if padded; int32 input token ids, padded on the right.
        positions: (N,) int32, indices into the flattened inputs whose next token is supervised.
        targets: (N,) int32, the id of that next token.
        weights: (N,) float32, the weight of each label in the loss: 1, or 0 for padding.
        owners: (N,) int32, the row of the batch (from 0) that each label belongs to; 0 for padding.
        num_tokens: input tokens, padding excluded.
        num_supervised: labels, padding excluded.
        rows: `file:line` of each row.
        packing: the layout of a packed batch; None for a padded batch.
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
        """Number of input positions computed, padding included."""
        return int(self.inputs.size)


@dataclass(frozen=True)
class Capacity:
    """The array sizes that a batch is padded to.

    Attributes:
        tokens: positions of a packed sequence (T).
        width: tokens per row of a grid (W).
        labels: labels (N).
    """

    tokens: int
    width: int
    labels: int

    @classmethod
    def of(cls, batches: Sequence[Sequence[Tokens]]) -> "Capacity":
        """Return the smallest capacity, rounded up to the multiples above, that fits each of `batches`."""
        return cls(
            tokens=round_up(max(num_inputs(rows) for rows in batches), LENGTH_MULTIPLE),
            width=round_up(max(len(row.ids) - 1 for rows in batches for row in rows), LENGTH_MULTIPLE),
            labels=round_up(max(sum(row.num_supervised for row in rows) for rows in batches), LABEL_MULTIPLE),
        )


def make_batch(rows: Sequence[Tokens], *, packing: bool = False, capacity: Capacity | None = None) -> Batch:
    """Build a micro-batch from tokenised rows.

    Position t predicts id t + 1, so a row of L ids has L - 1 inputs.

    Args:
        packing: lay the rows end to end in one sequence instead of a padded grid.
        capacity: the sizes to pad to; None: the smallest that fits the rows.
    """
    capacity = capacity or Capacity.of([rows])
    lengths = [len(row.ids) - 1 for row in rows]
    shape = (1, capacity.tokens) if packing else (len(rows), capacity.width)
    starts = np.cumsum([0, *lengths[:-1]]) if packing else capacity.width * np.arange(len(rows))
    inputs = np.zeros(shape, np.int32)
    positions, targets, owners = [], [], []
    for index, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
        inputs.reshape(-1)[start : start + length] = row.ids[:-1]
        row_positions = np.flatnonzero(row.supervised[1:])
        positions.append(start + row_positions)
        targets.append(row.ids[1:][row_positions])
        owners.append(np.full(len(row_positions), index, np.int32))
    num_supervised = sum(len(row_targets) for row_targets in targets)
    padding = (0, capacity.labels - num_supervised)
    return Batch(
        inputs=inputs,
        positions=np.pad(np.concatenate(positions).astype(np.int32), padding),
        targets=np.pad(np.concatenate(targets).astype(np.int32), padding),
        weights=np.pad(np.ones(num_supervised, np.float32), padding),
        owners=np.pad(np.concatenate(owners), padding),
        num_tokens=sum(lengths),
        num_supervised=num_supervised,
        rows=tuple(row.where for row in rows),
        packing=_packing(lengths, capacity) if packing else None,
    )


def check_ids(inputs: Int32, targets: Int32, vocab_size: int) -> None:
    """Check that every token id has an embedding.

    Raises:
        ValueError: an id is outside the vocabulary. A loss might clip it silently, and a framework might read
            out of bounds.
    """
    extremes = [int(extreme) for array in (inputs, targets) for extreme in (array.min(), array.max())]
    for token_id in (min(extremes), max(extremes)):
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"id {token_id} is outside the vocabulary of {vocab_size}")


def _packing(lengths: Sequence[int], capacity: Capacity) -> Packing:
    grid = np.full((len(lengths), capacity.width), -1, np.int32)
    is_token = np.arange(capacity.width) < np.array(lengths)[:, None]  # (R, W)
    grid[is_token] = np.arange(sum(lengths))
    slots = np.full(capacity.tokens, -1, np.int32)
    slots[: sum(lengths)] = np.flatnonzero(is_token)
    return Packing(grid, slots)


EVALUATION_TOKENS = 1024  # tokens per evaluation batch: fewer underuse the processor, more only use memory


def evaluation_rows(rows: Sequence[Tokens]) -> list[list[Tokens]]:
    """Group rows into evaluation batches: every row once, sorted by length, deterministic."""
    batches: list[list[Tokens]] = []
    num_tokens = 0
    for row in sorted(rows, key=lambda row: len(row.ids)):
        num_tokens += len(row.ids) - 1
        if not batches or num_tokens > EVALUATION_TOKENS:
            batches.append([])
            num_tokens = len(row.ids) - 1
        batches[-1].append(row)
    return batches


def num_inputs(rows: Sequence[Tokens]) -> int:
    """Return the number of input tokens of `rows`: every id except the last of each row."""
    return sum(len(row.ids) - 1 for row in rows)


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple
