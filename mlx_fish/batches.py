"""Tokens -> Batch: arrays for a step, in an order that is a function of (seed, epoch). Knows nothing of models.

No row is lost. Rows of like length share an update, so that updates cost about the same and little is padding, while a new
permutation each epoch changes which rows meet. A batch lies in one of two ways:

    packed   rows end to end, one sequence of T tokens     A A A A B B C C C C C ·      attention sees them as rows again
    padded   a grid of rows, each filled up                A A A A · / B B · · · / C C C C C
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mlx_fish.template import Tokens

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
        weights: (N,) float32, 1 for a label and 0 for a slot that only fills the capacity.
        num_tokens: real input tokens, fillers excluded.
        num_supervised: labels.
        rows: `file:line` of each row.
        packing: None for a padded batch.
    """

    inputs: Int32
    positions: Int32
    targets: Int32
    weights: npt.NDArray[np.float32]
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
            tokens=_round_up(max(_num_inputs(rows) for rows in batches), LENGTH_MULTIPLE),
            width=_round_up(max(len(row.ids) - 1 for rows in batches for row in rows), LENGTH_MULTIPLE),
            labels=_round_up(max(sum(row.num_supervised for row in rows) for rows in batches), LABEL_MULTIPLE),
        )


def make_batch(rows: Sequence[Tokens], *, packing: bool = False, capacity: Capacity | None = None) -> Batch:
    """Shift, lay out and gather: position t predicts id t + 1, so a row of T ids has T - 1 inputs."""
    capacity = capacity or Capacity.of([rows])
    lengths = [len(row.ids) - 1 for row in rows]
    shape = (1, capacity.tokens) if packing else (len(rows), capacity.width)
    starts = np.cumsum([0, *lengths[:-1]]) if packing else capacity.width * np.arange(len(rows))
    inputs = np.zeros(shape, np.int32)
    positions, targets = [], []
    for row, start, length in zip(rows, starts, lengths, strict=True):
        inputs.reshape(-1)[start : start + length] = row.ids[:-1]
        labelled = np.flatnonzero(row.supervised[1:])
        positions.append(start + labelled)
        targets.append(row.ids[1:][labelled])
    num_supervised = sum(len(target) for target in targets)
    fill = (0, capacity.labels - num_supervised)
    return Batch(
        inputs=inputs,
        positions=np.pad(np.concatenate(positions).astype(np.int32), fill),
        targets=np.pad(np.concatenate(targets).astype(np.int32), fill),
        weights=np.pad(np.ones(num_supervised, np.float32), fill),
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


def fixed_batches(rows: Sequence[Tokens], *, packing: bool) -> list[Batch]:
    """Batches for evaluation: every row once, sorted by length, always the same."""
    batches: list[list[Tokens]] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if not batches or _num_inputs([*batches[-1], row]) > EVALUATION_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return [make_batch(batch, packing=packing) for batch in batches]


# Length classes of an epoch: the rows of an update come from one of them.
NUM_CLASSES = {True: 5, False: 20}  # packed, padded


class Updates:
    """The batches of every optimizer update: `updates[step]` needs nothing but the step, so a resumed run continues exactly.

    An update holds `batch_size * accumulation` rows, cut into micro-batches of `batch_size`: the same rows, in the same order,
    whichever way the product is split.
    """

    def __init__(self, rows: Sequence[Tokens], *, batch_size: int, accumulation: int, seed: int, packing: bool = True):
        self.rows = rows
        self.batch_size = batch_size
        self.rows_per_update = batch_size * accumulation
        self.seed = seed
        self.packing = packing
        self.per_epoch = -(-len(rows) // self.rows_per_update)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __getitem__(self, step: int) -> list[Batch]:
        """The micro-batches of update `step`, counted from 0."""
        number, place = divmod(step, self.per_epoch)
        return [
            make_batch([self.rows[i] for i in indices], packing=self.packing, capacity=capacity)
            for indices, capacity in self._epoch(number)[place]
        ]

    def _make_epoch(self, number: int) -> list[list[tuple[list[int], Capacity]]]:
        """For each update its micro-batches: the rows, and what they are filled up to."""
        generator = np.random.default_rng([self.seed, number])
        order = generator.permutation(len(self.rows)).tolist()
        whole = len(order) // self.rows_per_update * self.rows_per_update
        updates = [order[whole:]] if order[whole:] else []  # a smaller update, of any rows
        by_length = sorted(order[:whole], key=lambda i: -len(self.rows[i].ids))
        lengths = [len(self.rows[i].ids) for i in by_length]
        for start, stop in _runs(lengths, NUM_CLASSES[self.packing], multiple=self.rows_per_update):
            updates += self._balanced(by_length[start:stop], generator)
        updates = [updates[i] for i in generator.permutation(len(updates))]
        if number == 0:
            # The largest update first: what does not fit in memory fails in the first seconds, not after an hour.
            largest = max(range(len(updates)), key=lambda number: self._size(updates[number]))
            updates[0], updates[largest] = updates[largest], updates[0]
        size = self.batch_size
        cut = [[update[at : at + size] for at in range(0, len(update), size)] for update in updates]
        capacities = self._capacities([micro for update in cut for micro in update])
        return [[(micro, capacities[micro[0]]) for micro in update] for update in cut]

    def _size(self, indices: Sequence[int]) -> tuple[int, int]:
        """Positions that these rows take, and the cells of attention's grid."""
        lengths = [len(self.rows[i].ids) - 1 for i in indices]
        grid = len(lengths) * max(lengths)
        return sum(lengths) if self.packing else grid, grid

    def _balanced(self, indices: Sequence[int], generator: np.random.Generator) -> list[list[int]]:
        """Deal rows, longest first, each to the update with the fewest tokens that still has room: sums come out nearly equal."""
        updates: list[list[int]] = [[] for _ in range(len(indices) // self.rows_per_update)]
        open_updates = [(0, place, number) for number, place in enumerate(generator.permutation(len(updates)).tolist())]
        for index in indices:
            tokens, place, number = heapq.heappop(open_updates)
            updates[number].append(index)
            if len(updates[number]) < self.rows_per_update:
                heapq.heappush(open_updates, (tokens + len(self.rows[index].ids), place, number))
        return updates

    def _capacities(self, micro_batches: Sequence[list[int]]) -> dict[int, Capacity]:
        """By its first row, the capacity of each micro-batch: one for a run of like sizes, so shapes are few and little is filled up."""
        by_count: dict[int, list[list[int]]] = {}
        for indices in sorted(micro_batches, key=lambda indices: self._size(indices)[0], reverse=True):
            by_count.setdefault(len(indices), []).append(indices)
        # A packed sequence of several rows is balanced by the choice of its rows; a single row needs more capacities to fit.
        num_runs = max(NUM_CLASSES[self.packing], NUM_CLASSES[False] // self.batch_size)
        capacities: dict[int, Capacity] = {}
        for alike in by_count.values():
            for start, stop in _runs([self._size(indices)[0] for indices in alike], num_runs):
                capacity = Capacity.of([[self.rows[i] for i in indices] for indices in alike[start:stop]])
                capacities |= {indices[0]: capacity for indices in alike[start:stop]}
        return capacities


def _runs(sizes: Sequence[int], number: int, *, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut a falling sequence into at most `number` runs of like sums, each of a multiple of `multiple` members."""
    sums = np.cumsum(sizes)
    shares = sums[-1] * np.arange(1, number) / number if len(sizes) else []
    cuts = [_round_up(int(np.searchsorted(sums, share)) + 1, multiple) for share in shares]
    borders = sorted({0, *(min(cut, len(sizes)) for cut in cuts), len(sizes)})
    return list(pairwise(borders))


def padding_share(updates: Updates, num_updates: int) -> float:
    """The share of computed input positions that is padding over the first `num_updates` updates."""
    computed = real = 0
    for step in range(num_updates):
        for batch in updates[step]:
            computed += batch.num_computed
            real += batch.num_tokens
    return 1 - real / computed


def _num_inputs(rows: Sequence[Tokens]) -> int:
    return sum(len(row.ids) - 1 for row in rows)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
