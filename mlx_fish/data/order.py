"""The rows of every optimizer update, as a function of (seed, epoch): a resumed run meets the same ones.

No row is lost. Rows of like length share an update, so that updates cost about the same and little is padding, while a new
permutation each epoch changes which rows meet.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from mlx_fish.data.batches import Batch, Capacity, make_batch, num_inputs, round_up
from mlx_fish.data.tokens import Tokens

# Length classes of an epoch: the rows of an update come from one of them.
NUM_CLASSES = {True: 5, False: 20}  # packed, padded


@dataclass(frozen=True)
class MicroBatch:
    """Rows that are computed together, and the sizes to which they are filled up."""

    rows: Sequence[Tokens]
    capacity: Capacity

    def num_computed(self, *, packing: bool) -> int:
        """Input positions computed, fillers included."""
        return self.capacity.tokens if packing else len(self.rows) * self.capacity.width


class Updates:
    """The batches of every optimizer update: `updates[step]` needs nothing but the step, so a resumed run continues exactly.

    An update holds `batch_size * accumulation` rows, cut into micro-batches of `batch_size`: the same rows, in the same order,
    whichever way the product is split.
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
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __getitem__(self, step: int) -> list[Batch]:
        """The micro-batches of update `step`, counted from 0."""
        return [
            self.collate(micro.rows, packing=self.packing, capacity=micro.capacity)
            for micro in self.micro_batches(step)
        ]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """What `self[step]` lays out, before any array is made."""
        number, place = divmod(step, self.per_epoch)
        return [
            MicroBatch([self.rows[i] for i in indices], capacity) for indices, capacity in self._epoch(number)[place]
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
    cuts = [round_up(int(np.searchsorted(sums, share)) + 1, multiple) for share in shares]
    borders = sorted({0, *(min(cut, len(sizes)) for cut in cuts), len(sizes)})
    return list(pairwise(borders))


def padding_share(updates: Updates, num_updates: int) -> float:
    """The share of computed input positions that is padding over the first `num_updates` updates."""
    computed = real = 0
    for step in range(num_updates):
        for micro in updates.micro_batches(step):
            computed += micro.num_computed(packing=updates.packing)
            real += num_inputs(micro.rows)
    return 1 - real / computed
