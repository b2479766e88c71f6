"""The training loop: which update, at which rate, validated and saved when. A backend computes; this module decides.

Nothing here depends on an earlier step but the adapter and its moments: the order of rows is a function of (seed, epoch), the
rate of the step, a dropout key of (seed, step, micro-batch).
"""

import math
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fish.adapters.peft import save_adapter
from mlx_fish.backends.choose import is_out_of_memory
from mlx_fish.backends.protocol import Backend, World, optimizer_step
from mlx_fish.data.batches import Batch, evaluation_rows
from mlx_fish.errors import FishError
from mlx_fish.evaluation.loss import mean_loss
from mlx_fish.inference.answers import sample_answer
from mlx_fish.planning.job import Job, end_ids, sample_question
from mlx_fish.runs.checkpoint import newest_valid, save_checkpoint
from mlx_fish.runs.folder import CHECKPOINTS, DEFAULT_OUTPUT
from mlx_fish.runs.record import adapter_config, run_record
from mlx_fish.signals import Interrupted, Stop
from mlx_fish.tracking.course import Course
from mlx_fish.tracking.events import Finished, Sampled, Saved, Started, Stopped, emit, sinks_added
from mlx_fish.tracking.jsonl import JsonLog
from mlx_fish.tracking.picture import Picture
from mlx_fish.training.schedule import learning_rate


class _NotFiniteError(FishError):
    """The same updates would come to it again, so going on does not help."""


def dropout_seeds(seed: int, step: int, count: int) -> list[int]:
    """One 32-bit key for each micro-batch of a step."""
    return [int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0]) for number in range(count)]


def make_updates(job: Job, backend: Backend, output: Path, state: dict[str, Any], stop: Stop) -> dict[str, Any]:
    """Make the updates from `state["step"]` on; returns the results for run.json.

    Raises:
        Interrupted: a signal came; the update at hand is finished and in a checkpoint.
        FishError: a loss that is not finite, too little memory, a file that cannot be written; with the way to go on.
    """
    # An answer may be empty, and after a resume it is the tuned model that would be asked.
    before = state["before"] if "before" in state else sample_answer(backend, job.template, job.sample, end_ids(job))
    course = Course(state.get("report"))
    log = JsonLog(output, logging_steps=job.config.logging_steps, state=state.get("report"))
    try:
        with sinks_added(log, Picture(output, course)):
            _Loop(job, backend, output, course, log, before).run(state["step"], stop)
            after = sample_answer(backend, job.template, job.sample, end_ids(job))
            emit(Sampled(sample_question(job), before, after))
            emit(Finished(output, course.tokens_per_second, backend.peak_memory(), course.elapsed))
    finally:
        log.close()
    return {
        "before": before,
        "after": after,
        "loss_before": course.eval_losses[0][1] if job.valid_rows else None,
        "loss_after": course.eval_losses[-1][1] if job.valid_rows else None,
        "training_losses": [course.losses[0][1], course.losses[-1][1]],
        "tokens_per_second": course.tokens_per_second,
        "seconds": course.elapsed,
        "peak_bytes": backend.peak_memory(),
        "backend": {"name": backend.name, "device": backend.device, "dtype": backend.dtype},
    }


class _Loop:
    """What the updates of one run have in common."""

    def __init__(self, job: Job, backend: Backend, output: Path, course: Course, log: JsonLog, before: str):
        self.job, self.backend, self.output = job, backend, output
        self.course, self.log, self.before = course, log, before
        self.world = World()
        collate, packing = job.objective.collate, job.updates.packing
        self.valid = [collate(rows, packing=packing) for rows in evaluation_rows(job.valid_rows)]
        self.saved = 0

    def run(self, step: int, stop: Stop) -> None:
        """From `step` updates done to all of them. A signal is acted on between two updates."""
        job, self.saved = self.job, step
        emit(Started(job.iters, job.updates.per_epoch, step))
        with stop.deferred():
            try:
                if step:
                    save_adapter(self.output, self.backend.adapter_arrays(), adapter_config(job))
                self._validate_if_due(step, stop)
                self.backend.reset_peak_memory()
                batches = job.updates[step]
                while step < job.iters:
                    stop.check()
                    batches = self._update(step, batches)
                    step += 1
                    self._validate_if_due(step, stop)
                    if step == job.iters or step % job.config.save_every == 0:
                        self._save(step)
                stop.check()
            except Interrupted:
                if step > self.saved:
                    self._save(step)
                emit(Stopped(step, job.iters))
                raise
            except Exception as error:
                emit(Stopped(step, job.iters))
                if (explained := self._explained(error, step)) is None:
                    raise
                raise explained from error

    def _update(self, step: int, batches: list[Batch]) -> list[Batch]:
        """Make update `step` (from 0) of its micro-batches; returns those of the next one, built while this one computes."""
        job, config = self.job, self.job.config
        rate = learning_rate(
            step, peak=config.learning_rate, total=job.iters, warmup=config.warmup, schedule=config.schedule
        )
        started = time.monotonic()
        seeds = dropout_seeds(config.seed, step, len(batches))
        wait = optimizer_step(self.backend, batches, rate, seeds, self.world)
        following = job.updates[step + 1] if step + 1 < job.iters else []
        result = wait()
        if not result.updated:
            raise _NotFiniteError(
                f"step {step + 1}: the loss ({result.loss}) or the gradient's norm ({result.grad_norm}) is not finite, so the adapter "
                f"was left as it was; lower --learning-rate, and look at the rows {', '.join(row for batch in batches for row in batch.rows)}."
            )
        self.course.updated(
            step + 1,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            tokens=sum(batch.num_tokens for batch in batches),
            seconds=time.monotonic() - started,
            peak=self.backend.peak_memory(),
        )
        return following

    def _validate_if_due(self, step: int, stop: Stop) -> None:
        every = self.job.config.eval_every
        due = step in (0, self.job.iters) or (every and step % every == 0)
        if not (self.valid and due) or self.course.was_validated(step):
            return
        loss = mean_loss(self.backend, stop.between(self.valid))
        if not math.isfinite(loss):
            raise _NotFiniteError(f"the validation after step {step} gives the loss {loss}; lower --learning-rate.")
        self.course.validated(step, loss)

    def _save(self, step: int) -> None:
        """A checkpoint, and then the same adapter at the top of the folder."""
        job, arrays = self.job, self.backend.adapter_arrays()
        report = {**self.course.state(), **self.log.state()}
        path = save_checkpoint(
            self.output / CHECKPOINTS,
            step,
            adapter=arrays,
            adapter_config=adapter_config(job),
            optimizer=self.backend.optimizer_arrays(),
            state={"run": run_record(job, {}), "before": self.before, "report": report},
            keep=job.config.keep,
            after=self.saved,
        )
        save_adapter(self.output, arrays, adapter_config(job))
        self.saved = step
        emit(Saved(step, path))

    def _explained(self, error: Exception, step: int) -> FishError | None:
        """What is raised in place of an error of the loop, with the last good checkpoint and the way to go on; None: nothing."""
        if isinstance(error, _NotFiniteError):  # a checkpoint of this very step holds the adapter that failed
            return FishError(f"{error}\n{_last_good(self.output, before=step)}.")
        if isinstance(error, FishError):
            return FishError(f"{error}\n{_last_good(self.output)}; to go on: {resume_command(self.output)}")
        if is_out_of_memory(error):
            return FishError(
                f"step {step + 1} does not fit in memory ({error}); lower --batch-size (raising --grad-accumulation instead), "
                f"--max-seq-length or --lora-rank.\n{_last_good(self.output)}."
            )
        return None


def _last_good(output: Path, *, before: int | None = None) -> str:
    good = newest_valid(output / CHECKPOINTS, before=before)
    return f"The last good checkpoint is {good}" if good else "There is no good checkpoint yet"


def resume_command(output: Path) -> str:
    """The command that goes on with the run."""
    where = f" --output-dir {shlex.quote(str(output))}" if output != DEFAULT_OUTPUT else ""
    return f"mlx-fish train --resume{where}"
