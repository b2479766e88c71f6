"""Tokens -> Batch: arrays for a step, in an order that is a function of (seed, epoch). Knows nothing of models.

No row is lost: an epoch's last update may hold fewer rows. Rows of like length share an update, so little is padding, while a
new permutation each epoch changes which rows meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mlx_fish.template import Tokens

Int32 = npt.NDArray[np.int32]

# Lengths and label counts are rounded up, so that a compiled step meets few shapes. Pads are never attended to (they stand on
# the right of a causal mask) and never labelled.
LENGTH_MULTIPLE = 8
LABEL_MULTIPLE = 32
SORT_WINDOW = 16  # updates among which rows are sorted by length: wider means less padding, narrower more mixing


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B rows of L input tokens, N label slots.

    Attributes:
        inputs: (B, L) int32, padded on the right.
        positions: (N,) int32, indices into the flattened (B * L) positions whose next token is supervised.
        targets: (N,) int32, that next token.
        weights: (N,) float32, 1 for a label and 0 for a slot that only fills the capacity.
        num_tokens: real input tokens, padding excluded.
        num_supervised: labels.
        rows: `file:line` of each row.
    """

    inputs: Int32
    positions: Int32
    targets: Int32
    weights: npt.NDArray[np.float32]
    num_tokens: int
    num_supervised: int
    rows: tuple[str, ...]

    @property
    def num_computed(self) -> int:
        """Input positions computed, padding included."""
        return int(self.inputs.size)


def make_batch(rows: Sequence[Tokens]) -> Batch:
    """Shift, pad and gather: position t predicts id t + 1, so a row of T ids has T - 1 inputs."""
    length = _round_up(max(len(row.ids) - 1 for row in rows), LENGTH_MULTIPLE)
    inputs = np.zeros((len(rows), length), np.int32)
    positions, targets = [], []
    for index, row in enumerate(rows):
        inputs[index, : len(row.ids) - 1] = row.ids[:-1]
        labelled = np.flatnonzero(row.supervised[1:])
        positions.append(index * length + labelled)
        targets.append(row.ids[1:][labelled])
    num_supervised = sum(len(target) for target in targets)
    padding = _round_up(num_supervised, LABEL_MULTIPLE) - num_supervised
    return Batch(
        inputs=inputs,
        positions=np.pad(np.concatenate(positions).astype(np.int32), (0, padding)),
        targets=np.pad(np.concatenate(targets).astype(np.int32), (0, padding)),
        weights=np.pad(np.ones(num_supervised, np.float32), (0, padding)),
        num_tokens=sum(len(row.ids) - 1 for row in rows),
        num_supervised=num_supervised,
        rows=tuple(row.where for row in rows),
    )


def fixed_batches(rows: Sequence[Tokens], batch_size: int) -> list[Batch]:
    """Batches for evaluation: every row once, sorted by length, always the same."""
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index].ids), index))
    return [make_batch([rows[i] for i in order[at : at + batch_size]]) for at in range(0, len(order), batch_size)]


class Updates:
    """The batches of every optimizer update: `updates[step]` needs nothing but the step, so a resumed run continues exactly.

    An update holds `batch_size * accumulation` rows, cut into micro-batches of `batch_size`: the same rows, in the same order,
    whichever way the product is split.
    """

    def __init__(self, rows: Sequence[Tokens], *, batch_size: int, accumulation: int, seed: int):
        self.rows = rows
        self.batch_size = batch_size
        self.rows_per_update = batch_size * accumulation
        self.seed = seed
        self.per_epoch = -(-len(rows) // self.rows_per_update)
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def __getitem__(self, step: int) -> list[Batch]:
        """The micro-batches of update `step`, counted from 0."""
        epoch, place = divmod(step, self.per_epoch)
        indices = self._order(epoch)[place]
        return [
            make_batch([self.rows[i] for i in indices[at : at + self.batch_size]])
            for at in range(0, len(indices), self.batch_size)
        ]

    def _order_of_epoch(self, epoch: int) -> list[list[int]]:
        generator = np.random.default_rng([self.seed, epoch])
        shuffled = generator.permutation(len(self.rows)).tolist()
        size, window = self.rows_per_update, self.rows_per_update * SORT_WINDOW
        updates: list[list[int]] = []
        for at in range(0, len(shuffled), window):
            near = sorted(shuffled[at : at + window], key=lambda index: -len(self.rows[index].ids))
            updates += [near[start : start + size] for start in range(0, len(near), size)]
        updates = [updates[i] for i in generator.permutation(len(updates))]
        if epoch == 0:
            # The longest update first: what does not fit in memory fails in the first seconds, not after an hour.
            longest = max(range(len(updates)), key=lambda i: max(len(self.rows[row].ids) for row in updates[i]))
            updates[0], updates[longest] = updates[longest], updates[0]
        return updates


def padding_share(updates: Updates, num_updates: int) -> float:
    """The share of computed input positions that is padding over the first `num_updates` updates."""
    computed = real = 0
    for step in range(num_updates):
        for batch in updates[step]:
            computed += batch.num_computed
            real += batch.num_tokens
    return 1 - real / computed


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
