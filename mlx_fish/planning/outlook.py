"""One job on one machine with one backend: peaks, times, and the largest batch and row that fit. Knows nothing of how it is told."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mlx_fish.backends.limits import TORCH_POSITIONS
from mlx_fish.data.batches import Capacity, evaluation_rows
from mlx_fish.data.order import MicroBatch
from mlx_fish.data.tokens import Tokens
from mlx_fish.planning.job import Job
from mlx_fish.planning.machine import Machine
from mlx_fish.planning.memory import Dimensions, Peak, Shape, forward_peak_of, peak_of, shape_of
from mlx_fish.planning.roofline import seconds_of, work_of

TORCH_BYTES = 500_000_000  # what torch holds for itself: a rough guess
MOST_ROWS = 4096


@dataclass(frozen=True)
class Largest:
    """Rows of the data's longest that fit in a micro-batch, and tokens in each of `--batch-size` rows that do."""

    batch_size: int
    length: int


@dataclass(frozen=True)
class Outlook:
    """One job on one machine with one backend, before anything is asked of it.

    Attributes:
        backend: `mlx` or `torch`. The memory model is MLX's; for torch it is a rough guess.
    """

    job: Job
    machine: Machine
    backend: str

    @property
    def rough(self) -> bool:
        return self.backend == "torch"

    @cached_property
    def model(self) -> Dimensions:
        """In float32 on a CPU, where half precision is widened; torch widens float16 everywhere."""
        on_cpu, stored = self.machine.device == "cpu", self.job.folder.weights.dtype
        widened = on_cpu or (self.rough and stored == "float16")
        model = Dimensions.of(self.job.folder, float_bytes=4 if widened else None)
        return replace(model, on_gpu=not on_cpu)

    @cached_property
    def shapes(self) -> dict[Shape, int]:
        """How often each shape comes in an epoch, or in the run when that is shorter."""
        found: dict[Shape, int] = {}
        for step in range(min(self.job.iters, self.job.updates.per_epoch)):
            for micro in self.job.updates.micro_batches(step):
                shape = shape_of(micro, packing=self.job.updates.packing)
                found[shape] = found.get(shape, 0) + 1
        return found

    @cached_property
    def validation_shapes(self) -> list[Shape]:
        return self._validation_shapes(None)

    def _validation_shapes(self, length: int | None) -> list[Shape]:
        return [self._shape_of(rows) for rows in evaluation_rows(_cut(self.job.valid_rows, length))]

    def peak(self, *, grad_checkpoint: bool) -> tuple[Peak, Shape]:
        """The peak of the run, and the micro-batch that causes it."""
        peaks = [(self.peak_of(shape, grad_checkpoint=grad_checkpoint), shape) for shape in self.shapes]
        peaks += [(forward_peak_of(self.model, self.job.spec, shape), shape) for shape in self.validation_shapes]
        return max(peaks, key=lambda pair: pair[0].total)

    def peak_of(self, shape: Shape, *, grad_checkpoint: bool) -> Peak:
        if not self.rough:
            return peak_of(self.model, self.job.spec, shape, grad_checkpoint=grad_checkpoint)
        positions = TORCH_POSITIONS[self.machine.device]
        rows = max(1, min(shape.rows, positions // shape.width))
        piece = Shape(rows * shape.width, rows, shape.width, max(1, shape.labels * rows // shape.rows))
        peak = peak_of(self.model, self.job.spec, piece, grad_checkpoint=grad_checkpoint)
        return replace(peak, framework=TORCH_BYTES)

    def seconds(self, *, grad_checkpoint: bool) -> float | None:
        """The time of all updates and validations, an estimate."""
        total = 0.0
        epochs = self.job.iters / min(self.job.iters, self.job.updates.per_epoch)
        for shape, count in self.shapes.items():
            work = work_of(self.model, self.job.spec, shape, grad_checkpoint=grad_checkpoint)
            seconds = seconds_of(work, self.machine)
            if seconds is None:
                return None
            total += seconds * count * epochs
        every = self.job.config.eval_every
        validations = 2 if every is None else 2 + self.job.iters // every
        for shape in self.validation_shapes:
            total += validations * (
                seconds_of(work_of(self.model, self.job.spec, shape, training=False), self.machine) or 0.0
            )
        return total

    def _has_room(self, num_bytes: int) -> bool:
        usable = self.machine.usable
        return usable is None or num_bytes <= usable

    def fits(self, shape: Shape, *, grad_checkpoint: bool) -> bool:
        return self._has_room(self.peak_of(shape, grad_checkpoint=grad_checkpoint).total)

    def fits_as_it_is(self, *, grad_checkpoint: bool) -> bool:
        """Whether the whole run fits, validation included."""
        return self._has_room(self.peak(grad_checkpoint=grad_checkpoint)[0].total)

    def validation_fits(self, length: int | None = None) -> bool:
        """Whether every validation batch fits (with rows cut to `length`): no other setting makes it smaller."""
        shapes = self.validation_shapes if length is None else self._validation_shapes(length)
        return all(self._has_room(forward_peak_of(self.model, self.job.spec, shape).total) for shape in shapes)

    def largest_batch(self, *, grad_checkpoint: bool, length: int | None = None) -> int:
        """The most rows a micro-batch that fit if the longest rows meet (cut to `length`); 0 when one alone does not."""
        rows = self._longest
        return _largest(
            min(MOST_ROWS, len(rows)),
            lambda count: self.fits(self._shape_of_rows(rows[:count], length), grad_checkpoint=grad_checkpoint),
        )

    def largest_length(self, *, grad_checkpoint: bool, batch_size: int | None = None) -> int:
        """The longest rows that fit, `batch_size` of them, when as large a share of each is supervised as in the data."""
        batch_size = batch_size or self.job.config.batch_size
        share = sum(row.num_supervised for row in self.job.rows) / sum(len(row.ids) for row in self.job.rows)
        limit = int(self.job.folder.config.get("max_position_embeddings", 32_768))

        def fits(blocks: int) -> bool:
            width = 8 * blocks
            shape = Shape(batch_size * width, batch_size, width, max(1, math.ceil(share * batch_size * width)))
            return self.fits(shape, grad_checkpoint=grad_checkpoint)

        return 8 * _largest(max(1, limit // 8), fits)

    def largest(self, *, grad_checkpoint: bool) -> "Largest":
        return Largest(
            self.largest_batch(grad_checkpoint=grad_checkpoint), self.largest_length(grad_checkpoint=grad_checkpoint)
        )

    def fits_in_four_bits(self, *, grad_checkpoint: bool) -> bool:
        """Whether the run would fit with the base quantised to 4 bits in groups of 64, each with a scale and a bias."""
        saved = self.model.weight_bytes - self.model.four_bit_bytes
        return self._has_room(self.peak(grad_checkpoint=grad_checkpoint)[0].total - saved)

    def _shape_of_rows(self, rows: Sequence[Tokens], length: int | None) -> Shape:
        return self._shape_of(_cut(rows, length))

    def _shape_of(self, rows: Sequence[Tokens]) -> Shape:
        shape = shape_of(MicroBatch(rows, Capacity.of([rows])), packing=self.job.updates.packing)
        return replace(shape, labels=max(1, shape.labels))

    @cached_property
    def _longest(self) -> list[Tokens]:
        return sorted(self.job.rows, key=lambda row: -len(row.ids))[:MOST_ROWS]


def _cut(rows: Sequence[Tokens], length: int | None) -> Sequence[Tokens]:
    if length is None:
        return rows
    return [replace(row, ids=row.ids[:length], supervised=row.supervised[:length]) for row in rows]


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number in 1..limit for which `fits` holds, 0 when it holds for none; it must not hold again beyond."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
