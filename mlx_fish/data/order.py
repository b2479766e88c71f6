"""Choose the rows of every optimizer update as a function of (seed, epoch).

A resumed run therefore sees the same rows. Every row is used once per epoch. Rows of similar length share an
update, so that updates cost about the same and little is padding, while a new permutation each epoch changes
which rows are combined.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from mlx_fish.data.batches import Batch, Capacity, make_batch, num_inputs, round_up
from mlx_fish.data.tokens import Tokens

# Number of length classes in an epoch. All rows of a full update come from the same class.
NUM_CLASSES_PACKED = 5
NUM_CLASSES_PADDED = 20


@dataclass(frozen=True)
class MicroBatch:
    """Rows that are computed together, and the array sizes that they are padded to."""

    rows: Sequence[Tokens]
    capacity: Capacity

    def num_computed(self, *, packing: bool) -> int:
        """Return the number of input positions computed, padding included."""
        return self.capacity.tokens if packing else len(self.rows) * self.capacity.width


class Updates:
    """The batches of every optimizer update.

    `updates[step]` depends only on the step, so a resumed run continues exactly. An update has
    `batch_size * accumulation` rows, split into micro-batches of `batch_size`. The rows and their order depend
    only on that product, not on its factors.
    """

    def __init__(
        self,
        rows: Sequence[Tokens],
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        packing: bool = True,
        collate: Callable[..., Batch] = make_batch,
    ):
        self.rows = rows
        self.collate = collate
        self.batch_size = batch_size
        self.rows_per_update = batch_size * accumulation
        self.seed = seed
        self.packing = packing
        self.per_epoch = -(-len(rows) // self.rows_per_update)
        self._epoch_updates = lru_cache(maxsize=2)(self._make_epoch)

    def __getitem__(self, step: int) -> list[Batch]:
        """Return the batches of update `step`, counted from 0, one per micro-batch."""
        return [
            self.collate(micro.rows, packing=self.packing, capacity=micro.capacity)
            for micro in self.micro_batches(step)
        ]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of update `step` without building arrays; `self[step]` lays these out."""
        epoch, update_index = divmod(step, self.per_epoch)
        return [
            MicroBatch([self.rows[i] for i in indices], capacity)
            for indices, capacity in self._epoch_updates(epoch)[update_index]
        ]

    def _make_epoch(self, epoch: int) -> list[list[tuple[list[int], Capacity]]]:
        """Return the updates of an epoch, each a list of micro-batches (row indices, capacity to pad to)."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.rows)).tolist()
        num_full = len(order) // self.rows_per_update * self.rows_per_update
        updates = [order[num_full:]] if order[num_full:] else []  # the remainder, a smaller update
        by_length = sorted(order[:num_full], key=lambda i: -len(self.rows[i].ids))
        lengths = [len(self.rows[i].ids) for i in by_length]
        num_classes = NUM_CLASSES_PACKED if self.packing else NUM_CLASSES_PADDED
        for start, stop in _split_into_runs(lengths, num_classes, multiple=self.rows_per_update):
            updates += self._balance(by_length[start:stop], generator)
        updates = [updates[i] for i in generator.permutation(len(updates))]
        if epoch == 0:
            # The largest update goes first, so that a run that does not fit in memory fails within seconds, not
            # after an hour.
            largest = max(range(len(updates)), key=lambda i: self._size(updates[i]))
            updates[0], updates[largest] = updates[largest], updates[0]
        size = self.batch_size
        split_updates = [[update[start : start + size] for start in range(0, len(update), size)] for update in updates]
        capacities = self._capacities([micro for update in split_updates for micro in update])
        return [[(micro, capacities[micro[0]]) for micro in update] for update in split_updates]

    def _size(self, indices: Sequence[int]) -> tuple[int, int]:
        """Return (input positions computed, cells of the attention grid) for these rows, before rounding up."""
        lengths = [len(self.rows[i].ids) - 1 for i in indices]
        num_cells = len(lengths) * max(lengths)
        return sum(lengths) if self.packing else num_cells, num_cells

    def _balance(self, indices: Sequence[int], generator: np.random.Generator) -> list[list[int]]:
        """Distribute rows over updates so that their token counts are nearly equal.

        Each row, longest first, goes to the update with the fewest tokens that is not full. Ties are broken
        at random.
        """
        updates: list[list[int]] = [[] for _ in range(len(indices) // self.rows_per_update)]
        open_updates = [(0, rank, i) for i, rank in enumerate(generator.permutation(len(updates)).tolist())]
        for index in indices:
            num_tokens, rank, i = heapq.heappop(open_updates)
            updates[i].append(index)
            if len(updates[i]) < self.rows_per_update:
                heapq.heappush(open_updates, (num_tokens + len(self.rows[index].ids), rank, i))
        return updates

    def _capacities(self, micro_batches: Sequence[list[int]]) -> dict[int, Capacity]:
        """Return the capacity of each micro-batch, keyed by the index of its first row.

        Micro-batches of similar size share a capacity, so that there are few shapes and little padding.
        """
        by_num_rows: dict[int, list[list[int]]] = {}
        for indices in sorted(micro_batches, key=lambda indices: self._size(indices)[0], reverse=True):
            by_num_rows.setdefault(len(indices), []).append(indices)
        # A packed sequence of several rows is balanced by the choice of its rows; with one row per sequence,
        # more capacities are needed for a close fit.
        num_classes = NUM_CLASSES_PACKED if self.packing else NUM_CLASSES_PADDED
        num_runs = max(num_classes, NUM_CLASSES_PADDED // self.batch_size)
        capacities: dict[int, Capacity] = {}
        for group in by_num_rows.values():
            for start, stop in _split_into_runs([self._size(indices)[0] for indices in group], num_runs):
                capacity = Capacity.of([[self.rows[i] for i in indices] for indices in group[start:stop]])
                capacities |= {indices[0]: capacity for indices in group[start:stop]}
        return capacities


def _split_into_runs(sizes: Sequence[int], num_runs: int, *, multiple: int = 1) -> list[tuple[int, int]]:
    """Split a descending sequence into at most `num_runs` consecutive runs of similar sum.

    Args:
        multiple: the length of every run is a multiple of this; `len(sizes)` must be one too.

    Returns:
        (start, stop) of each run.
    """
    sums = np.cumsum(sizes)
    shares = sums[-1] * np.arange(1, num_runs) / num_runs if len(sizes) else []
    stops = [round_up(int(np.searchsorted(sums, share)) + 1, multiple) for share in shares]
    boundaries = sorted({0, *(min(stop, len(sizes)) for stop in stops), len(sizes)})
    return list(pairwise(boundaries))


def padding_share(updates: Updates, num_updates: int) -> float:
    """Return the fraction of computed input positions that is padding, over the first `num_updates` updates."""
    num_computed = num_real = 0
    for step in range(num_updates):
        for micro in updates.micro_batches(step):
            num_computed += micro.num_computed(packing=updates.packing)
            num_real += num_inputs(micro.rows)
    return 1 - num_real / num_computed
