"""Run the training loop: updates, validations and checkpoints. The backend does the computation.

The only state carried from one step to the next is the adapter and its AdamW moments. Everything else is a pure
function, so a resumed run computes exactly what an uninterrupted one would:

    order of rows     (seed, epoch)
    learning rate     step
    dropout seed      (seed, step, micro-batch)
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
from mlx_fish.tracking.course import RunMetrics
from mlx_fish.tracking.events import Finished, Sampled, Saved, Started, Stopped, emit, sinks_added
from mlx_fish.tracking.jsonl import JsonLog
from mlx_fish.tracking.picture import LossCurve
from mlx_fish.training.schedule import learning_rate


class _NotFiniteError(FishError):
    """A loss or gradient is not finite. Resuming does not help: the same updates would fail again."""


def dropout_seeds(seed: int, step: int, count: int) -> list[int]:
    """Return one 32-bit dropout seed for each of `count` micro-batches of a step."""
    return [int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0]) for number in range(count)]


def make_updates(job: Job, backend: Backend, output: Path, state: dict[str, Any], stop: Stop) -> dict[str, Any]:
    """Train from update `state["step"]` to the end.

    Args:
        state: loop state from a checkpoint, or `{"step": 0}`.

    Returns:
        the results for run.json.

    Raises:
        Interrupted: a signal arrived; the current update was finished and saved in a checkpoint.
        FishError: a loss is not finite, memory ran out, or a file cannot be written. The message names the last
            valid checkpoint.
    """
    # Test for the key, not for an empty answer: on a resume, only the tuned model could answer.
    before = state["before"] if "before" in state else sample_answer(backend, job.template, job.sample, end_ids(job))
    metrics = RunMetrics(state.get("report"))
    log = JsonLog(output, logging_steps=job.config.logging_steps, state=state.get("report"))
    try:
        with sinks_added(log, LossCurve(output, metrics)):
            _Loop(job, backend, output, metrics, log, before).run(state["step"], stop)
            after = sample_answer(backend, job.template, job.sample, end_ids(job))
            emit(Sampled(sample_question(job), before, after))
            emit(Finished(output, metrics.tokens_per_second, backend.peak_memory(), metrics.elapsed))
    finally:
        log.close()
    return {
        "before": before,
        "after": after,
        "loss_before": metrics.eval_losses[0][1] if job.valid_rows else None,
        "loss_after": metrics.eval_losses[-1][1] if job.valid_rows else None,
        "training_losses": [metrics.losses[0][1], metrics.losses[-1][1]],
        "tokens_per_second": metrics.tokens_per_second,
        "seconds": metrics.elapsed,
        "peak_bytes": backend.peak_memory(),
        "backend": {"name": backend.name, "device": backend.device, "dtype": backend.dtype},
    }


class _Loop:
    """The training loop of one run.

    Attributes:
        before: answer to the sample question before training.
        valid: collated validation batches.
        saved: step of the last checkpoint.
    """

    def __init__(self, job: Job, backend: Backend, output: Path, metrics: RunMetrics, log: JsonLog, before: str):
        self.job, self.backend, self.output = job, backend, output
        self.metrics, self.log, self.before = metrics, log, before
        self.world = World()
        collate, packing = job.objective.collate, job.updates.packing
        self.valid = [collate(rows, packing=packing) for rows in evaluation_rows(job.valid_rows)]
        self.saved = 0

    def run(self, step: int, stop: Stop) -> None:
        """Train from `step` completed updates to the end. Signals take effect between two updates."""
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
                if (explained := self._explain(error, step)) is None:
                    raise
                raise explained from error

    def _update(self, step: int, batches: list[Batch]) -> list[Batch]:
        """Run update `step`, from 0.

        Returns:
            the micro-batches of the next update, which are built while the backend computes this one.
        """
        job, config = self.job, self.job.config
        rate = learning_rate(
            step, peak=config.learning_rate, total=job.iters, warmup=config.warmup, schedule=config.schedule
        )
        started = time.monotonic()
        seeds = dropout_seeds(config.seed, step, len(batches))
        wait = optimizer_step(self.backend, batches, rate, seeds, self.world)
        next_batches = job.updates[step + 1] if step + 1 < job.iters else []
        result = wait()
        if not result.updated:
            raise _NotFiniteError(
                f"step {step + 1}: the loss ({result.loss}) or the gradient norm ({result.grad_norm}) is not finite, so the update "
                f"was not applied; lower --learning-rate, and check the rows {', '.join(row for batch in batches for row in batch.rows)}."
            )
        self.metrics.updated(
            step + 1,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            tokens=sum(batch.num_tokens for batch in batches),
            seconds=time.monotonic() - started,
            peak=self.backend.peak_memory(),
        )
        return next_batches

    def _validate_if_due(self, step: int, stop: Stop) -> None:
        """Validate after `step` updates if it is due and was not already done before a resume."""
        every = self.job.config.eval_every
        due = step in (0, self.job.iters) or (every and step % every == 0)
        if not (self.valid and due) or self.metrics.was_validated(step):
            return
        loss = mean_loss(self.backend, stop.between(self.valid))
        if not math.isfinite(loss):
            raise _NotFiniteError(f"the validation loss after step {step} is {loss}; lower --learning-rate.")
        self.metrics.validated(step, loss)

    def _save(self, step: int) -> None:
        """Save a checkpoint, then write the same adapter to the top of the output folder."""
        job, arrays = self.job, self.backend.adapter_arrays()
        report = {**self.metrics.state(), **self.log.state()}
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

    def _explain(self, error: Exception, step: int) -> FishError | None:
        """Return an error for the user that names the last valid checkpoint, or None for an unexpected error."""
        if isinstance(error, _NotFiniteError):  # a checkpoint of this very step would hold the adapter that failed
            return FishError(f"{error}\n{_last_checkpoint(self.output, before=step)}.")
        if isinstance(error, FishError):
            return FishError(f"{error}\n{_last_checkpoint(self.output)}; to continue: {resume_command(self.output)}")
        if is_out_of_memory(error):
            return FishError(
                f"step {step + 1} does not fit in memory ({error}); lower --batch-size (and raise --grad-accumulation to compensate), "
                f"--max-seq-length or --lora-rank.\n{_last_checkpoint(self.output)}."
            )
        return None


def _last_checkpoint(output: Path, *, before: int | None = None) -> str:
    checkpoint = newest_valid(output / CHECKPOINTS, before=before)
    return f"The last valid checkpoint is {checkpoint}" if checkpoint else "There is no valid checkpoint yet"


def resume_command(output: Path) -> str:
    """Return the shell command that resumes the run."""
    flags = f" --output-dir {shlex.quote(str(output))}" if output != DEFAULT_OUTPUT else ""
    return f"mlx-fish train --resume{flags}"
