"""Predict memory and time of one job on one machine and backend, and the largest batch and sequence that fit.

Independent of how the results are presented.
"""

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

TORCH_OVERHEAD_BYTES = 500_000_000  # memory that torch holds for itself: a rough guess
MAX_ROWS = 4096  # upper bound of the search for the largest batch


@dataclass(frozen=True)
class LargestFit:
    """The largest settings that fit in memory.

    Attributes:
        batch_size: rows in a micro-batch, if it consists of the longest rows of the data.
        length: tokens per row, in a micro-batch of `--batch-size` rows.
    """

    batch_size: int
    length: int


@dataclass(frozen=True)
class Outlook:
    """Memory and time estimates for one job on one machine and backend.

    Attributes:
        backend: `mlx` or `torch`. The memory model describes MLX; for torch it is a rough guess.
    """

    job: Job
    machine: Machine
    backend: str

    @property
    def rough(self) -> bool:
        """Whether the predicted peak is a guess rather than a measured model."""
        return self.backend == "torch"

    @cached_property
    def model(self) -> Dimensions:
        """The base model's dimensions, in the dtype that it is computed with.

        A CPU computes half precision in float32; torch widens float16 on every device.
        """
        on_cpu, stored = self.machine.device == "cpu", self.job.folder.weights.dtype
        widened = on_cpu or (self.rough and stored == "float16")
        model = Dimensions.of(self.job.folder, float_bytes=4 if widened else None)
        return replace(model, on_gpu=not on_cpu)

    @cached_property
    def shapes(self) -> dict[Shape, int]:
        """Number of micro-batches of each shape in one epoch, or in the run if that is shorter."""
        counts: dict[Shape, int] = {}
        for step in range(min(self.job.iters, self.job.updates.per_epoch)):
            for micro in self.job.updates.micro_batches(step):
                shape = shape_of(micro, packing=self.job.updates.packing)
                counts[shape] = counts.get(shape, 0) + 1
        return counts

    @cached_property
    def validation_shapes(self) -> list[Shape]:
        """The shape of each validation batch."""
        return self._validation_shapes(None)

    def _validation_shapes(self, length: int | None) -> list[Shape]:
        return [self._shape_of(rows) for rows in evaluation_rows(_truncate(self.job.valid_rows, length))]

    def peak(self, *, grad_checkpoint: bool) -> tuple[Peak, Shape]:
        """Return the peak memory of the run, and the shape of the micro-batch that causes it."""
        peaks = [(self.peak_of(shape, grad_checkpoint=grad_checkpoint), shape) for shape in self.shapes]
        peaks += [(forward_peak_of(self.model, self.job.spec, shape), shape) for shape in self.validation_shapes]
        return max(peaks, key=lambda pair: pair[0].total)

    def peak_of(self, shape: Shape, *, grad_checkpoint: bool) -> Peak:
        """Return the peak memory of an update over one micro-batch.

        torch computes a limited number of positions at a time, so for torch only such a slice counts.
        """
        if not self.rough:
            return peak_of(self.model, self.job.spec, shape, grad_checkpoint=grad_checkpoint)
        positions = TORCH_POSITIONS[self.machine.device]
        rows = max(1, min(shape.rows, positions // shape.width))
        slice_shape = Shape(rows * shape.width, rows, shape.width, max(1, shape.labels * rows // shape.rows))
        peak = peak_of(self.model, self.job.spec, slice_shape, grad_checkpoint=grad_checkpoint)
        return replace(peak, framework=TORCH_OVERHEAD_BYTES)

    def seconds(self, *, grad_checkpoint: bool) -> float | None:
        """Estimate the time of all updates and validations in seconds; None if the machine's speed is unknown."""
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

    def _is_within_memory(self, num_bytes: int) -> bool:
        usable = self.machine.usable
        return usable is None or num_bytes <= usable

    def fits(self, shape: Shape, *, grad_checkpoint: bool) -> bool:
        """Return whether an update over a micro-batch of this shape fits in memory."""
        return self._is_within_memory(self.peak_of(shape, grad_checkpoint=grad_checkpoint).total)

    def run_fits(self, *, grad_checkpoint: bool) -> bool:
        """Return whether the run fits in memory with its current settings, validation included."""
        return self._is_within_memory(self.peak(grad_checkpoint=grad_checkpoint)[0].total)

    def validation_fits(self, length: int | None = None) -> bool:
        """Return whether every validation batch fits, with rows truncated to `length`.

        No setting but the maximum length makes these batches smaller.
        """
        shapes = self.validation_shapes if length is None else self._validation_shapes(length)
        return all(self._is_within_memory(forward_peak_of(self.model, self.job.spec, shape).total) for shape in shapes)

    def largest_batch(self, *, grad_checkpoint: bool, length: int | None = None) -> int:
        """Return the largest number of rows per micro-batch that fits; 0 if not even one row does.

        Assumes the worst case, a micro-batch of the longest rows, truncated to `length`.
        """
        rows = self._longest_rows
        return _largest_fitting(
            min(MAX_ROWS, len(rows)),
            lambda count: self.fits(self._shape_of_rows(rows[:count], length), grad_checkpoint=grad_checkpoint),
        )

    def largest_length(self, *, grad_checkpoint: bool, batch_size: int | None = None) -> int:
        """Return the largest number of tokens per row at which `batch_size` rows fit.

        Assumes the same share of supervised tokens as in the data.
        """
        batch_size = batch_size or self.job.config.batch_size
        share = sum(row.num_supervised for row in self.job.rows) / sum(len(row.ids) for row in self.job.rows)
        limit = int(self.job.folder.config.get("max_position_embeddings", 32_768))

        def fits(multiple: int) -> bool:
            width = 8 * multiple
            shape = Shape(batch_size * width, batch_size, width, max(1, math.ceil(share * batch_size * width)))
            return self.fits(shape, grad_checkpoint=grad_checkpoint)

        return 8 * _largest_fitting(max(1, limit // 8), fits)

    def largest(self, *, grad_checkpoint: bool) -> "LargestFit":
        """Return the largest batch size and the largest row length that fit, each on its own."""
        return LargestFit(
            self.largest_batch(grad_checkpoint=grad_checkpoint), self.largest_length(grad_checkpoint=grad_checkpoint)
        )

    def fits_with_four_bit_base(self, *, grad_checkpoint: bool) -> bool:
        """Return whether the run fits with a 4-bit base, in groups of 64 with a scale and a bias each."""
        reduction = self.model.weight_bytes - self.model.four_bit_bytes
        return self._is_within_memory(self.peak(grad_checkpoint=grad_checkpoint)[0].total - reduction)

    def _shape_of_rows(self, rows: Sequence[Tokens], length: int | None) -> Shape:
        return self._shape_of(_truncate(rows, length))

    def _shape_of(self, rows: Sequence[Tokens]) -> Shape:
        shape = shape_of(MicroBatch(rows, Capacity.of([rows])), packing=self.job.updates.packing)
        return replace(shape, labels=max(1, shape.labels))

    @cached_property
    def _longest_rows(self) -> list[Tokens]:
        return sorted(self.job.rows, key=lambda row: -len(row.ids))[:MAX_ROWS]


def _truncate(rows: Sequence[Tokens], length: int | None) -> Sequence[Tokens]:
    if length is None:
        return rows
    return [replace(row, ids=row.ids[:length], supervised=row.supervised[:length]) for row in rows]


def _largest_fitting(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number in 1..limit for which `fits` holds, or 0 if there is none, by bisection.

    `fits` must be monotonic: once it fails, it fails for every larger number.
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
