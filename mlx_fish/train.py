"""The training loop: which update, at which rate, validated and saved when. A backend computes; this room decides.

Nothing here depends on an earlier step but the adapter and its moments: the order of rows is a function of (seed, epoch), the
rate of the step, a dropout key of (seed, step, micro-batch).
"""

import math
import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fish.adapter import RUN_FILE, initial_arrays, save_adapter
from mlx_fish.backends import Backend, Sampling, choose_backend, is_out_of_memory, load_backend
from mlx_fish.batches import Batch, fixed_batches
from mlx_fish.checkpoint import newest_valid, save_checkpoint
from mlx_fish.config import TrainConfig
from mlx_fish.data import Turn
from mlx_fish.errors import FishError
from mlx_fish.files import write_json, write_text
from mlx_fish.hub import find_model
from mlx_fish.job import Job, describe, end_ids, load_data, make_job
from mlx_fish.model_card import Tuning, adapter_card, license_of
from mlx_fish.plan import planned
from mlx_fish.record import adapter_config, run_record, write_run
from mlx_fish.report import Report, draw, say
from mlx_fish.resume import NEWEST, Point, base_of, check_arrays, check_same, continued, find_point, place
from mlx_fish.run_folder import CHECKPOINTS, DEFAULT_OUTPUT, check_free, check_space, clean, locked, prepare
from mlx_fish.schedule import learning_rate
from mlx_fish.signals import Interrupted, Stop, catching
from mlx_fish.template import Template, check_name

SAMPLE_TOKENS = 32
SAMPLE_QUESTION = "金鱼为什么容易浮头？"


class _NotFiniteError(FishError):
    """The same updates would come to it again, so going on does not help."""


def train(config: TrainConfig, *, dry_run: bool = False, force: bool = False) -> Path:
    """Run the whole of `mlx-fish train`; returns the output folder.

    Args:
        force: train even what the plan says cannot fit in memory.

    Raises:
        FishError: any mistake in the settings, files or rows, before the model loads; a run that cannot fit in memory; a
            non-finite loss, naming step and rows.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; the updates done are in a checkpoint.
    """
    output = Path(config.output_dir)
    choose_backend(config.backend)
    check_name(config.template)
    check_free(output, overwrite=config.overwrite)
    with catching() as stop:
        dataset = load_data(config)  # its mistakes are told before a model is looked for
        job = make_job(config, find_model(config.model), dataset)
        describe(job)
        job = planned(job, force=force)
        if dry_run:
            say("Dry run: nothing was written.")
            return output
        with locked(output):
            check_free(output, overwrite=config.overwrite)  # once more, now that nobody else writes there
            _carry_out(job, output, None, stop)
    return output


def resume(settings: dict[str, Any], checkpoint: str = NEWEST, *, dry_run: bool = False, force: bool = False) -> Path:
    """Go on with a run as if it had never stopped: the same losses and the same adapter, to the bit.

    Args:
        settings: those asked for; the run's own stand for the rest.
        checkpoint: its name, number or path; `NEWEST` is the newest whole one.

    Raises:
        FishError: also when a setting, the data or the base is not what the run began with.
    """
    output = place(settings, checkpoint)
    with catching() as stop, locked(output):
        point = find_point(output, checkpoint)
        config = continued(point, settings)
        choose_backend(config.backend)
        job = make_job(config, base_of(point, settings), load_data(config))
        check_same(point, job, run_record(job, {}))
        check_arrays(point, job)
        if point.step >= job.iters and point.has_results:
            clean(output)
            say(f"{output} is complete: it did its {job.iters} updates; a higher --iters would train on.")
            return output
        describe(job)
        job = planned(job, force=force, resuming=True)
        say(f"  resuming    after {point.step} of {job.iters} updates")
        if dry_run:
            say("Dry run: nothing was written.")
        else:
            _carry_out(job, output, point, stop)
    return output


def _carry_out(job: Job, output: Path, point: Point | None, stop: Stop) -> None:
    """All that happens once a job is made and its folder is ours."""
    check_space(output, num_parameters=job.spec.num_parameters, num_checkpoints=job.config.keep + 1)
    backend = load_backend(job.folder, lambda text: say(f"! {text}"), name=choose_backend(job.config.backend))
    say(f"  computing   {backend.name} on {backend.device}, {backend.dtype}")
    checkpoint = point.checkpoint if point else None
    arrays = checkpoint.adapter if checkpoint else initial_arrays(job.spec, job.config.seed)
    if point is None:
        prepare(output)
    else:
        clean(output)
    backend.attach(job.spec, arrays, grad_checkpoint=job.config.grad_checkpoint == "on")
    if checkpoint is not None:
        backend.restore_optimizer(checkpoint.optimizer, checkpoint.step)
    write_run(job, output, {})
    try:
        results = _run(job, backend, output, checkpoint.state if checkpoint else {"step": 0}, stop)
        _close(job, output, results)
    except Interrupted:
        say(f"\nTo go on:\n  {resume_command(output)}")
        raise


def validate(backend: Backend, batches: Iterable[Batch]) -> float:
    """Mean loss over all supervised tokens of the batches: a sum divided once, never a mean of means."""
    loss, tokens = 0.0, 0
    for batch in batches:
        loss += backend.evaluate(batch)
        tokens += batch.num_supervised
    return loss / tokens


def sample_answer(backend: Backend, template: Template, end_ids: tuple[int, ...]) -> str:
    """The greedy answer to one fixed question, cut at SAMPLE_TOKENS."""
    prompt = template.prompt_ids((Turn("user", SAMPLE_QUESTION),))
    ids = list(backend.generate(prompt, Sampling(max_tokens=SAMPLE_TOKENS), end_ids))
    text = template.answer_text(ids).strip().replace("\n", " ")
    return text + ("…" if len(ids) == SAMPLE_TOKENS else "")


def dropout_seeds(seed: int, step: int, count: int) -> list[int]:
    """One 32-bit key for each micro-batch of a step."""
    return [int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0]) for number in range(count)]


def _run(job: Job, backend: Backend, output: Path, state: dict[str, Any], stop: Stop) -> dict[str, Any]:
    """The updates from `state["step"]` on. Stopped by a signal, it finishes the update, writes a checkpoint and raises."""
    config = job.config
    valid = fixed_batches(job.valid_rows, packing=job.updates.packing)
    before = state.get("before") or sample_answer(backend, job.template, end_ids(job))
    report = Report(
        output,
        total=job.iters,
        per_epoch=job.updates.per_epoch,
        logging_steps=config.logging_steps,
        step=state["step"],
        state=state.get("report"),
    )

    def save(step: int) -> None:
        _save(job, backend, output, step, {"before": before, "report": report.state()}, after=saved)

    def validate_if_due(step: int) -> None:
        due = step in (0, job.iters) or (config.eval_every and step % config.eval_every == 0)
        if not (valid and due) or report.was_validated(step):
            return
        loss = validate(backend, stop.between(valid))
        if not math.isfinite(loss):
            raise _NotFiniteError(f"the validation after step {step} gives the loss {loss}; lower --learning-rate.")
        report.validated(step, loss)
        report.note(f"  validation  {loss:.4f} {f'after step {step}' if step else 'before training'}")

    step = saved = state["step"]
    with report, stop.deferred():
        try:
            if step:
                save_adapter(output, backend.adapter_arrays(), adapter_config(job))
            validate_if_due(step)
            backend.reset_peak_memory()
            batches = job.updates[step]
            while step < job.iters:
                stop.check()
                batches = _update(job, backend, report, step, batches)
                step += 1
                validate_if_due(step)
                if step == job.iters or step % config.save_every == 0:
                    save(step)
                    saved = step
            stop.check()
        except Interrupted:
            if step > saved:
                save(step)
            report.note(f"! stopped after {step} of {job.iters} updates")
            raise
        except _NotFiniteError as error:  # a checkpoint of this very step holds the adapter that failed
            raise FishError(f"{error}\n{_last_good(output, before=step)}.") from error
        except FishError as error:
            raise FishError(f"{error}\n{_last_good(output)}; to go on: {resume_command(output)}") from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise FishError(
                f"step {step + 1} does not fit in memory ({error}); lower --batch-size (raising --grad-accumulation instead), "
                f"--max-seq-length or --lora-rank.\n{_last_good(output)}."
            ) from error
    draw(output, report.losses, report.eval_losses)
    return {
        "before": before,
        "after": sample_answer(backend, job.template, end_ids(job)),
        "loss_before": report.eval_losses[0][1] if valid else None,
        "loss_after": report.eval_losses[-1][1] if valid else None,
        "training_losses": [report.losses[0][1], report.losses[-1][1]],
        "tokens_per_second": report.tokens / report.training_seconds,
        "seconds": time.monotonic() - report.started,
        "peak_bytes": backend.peak_memory(),
        "backend": {"name": backend.name, "device": backend.device, "dtype": backend.dtype},
    }


def _update(job: Job, backend: Backend, report: Report, step: int, batches: list[Batch]) -> list[Batch]:
    """Do update `step` (from 0) over its micro-batches; returns those of the next one, built while this one computes."""
    config = job.config
    rate = learning_rate(
        step, peak=config.learning_rate, total=job.iters, warmup=config.warmup, schedule=config.schedule
    )
    started = time.monotonic()
    wait = backend.step(batches, rate, dropout_seeds(config.seed, step, len(batches)))
    following = job.updates[step + 1] if step + 1 < job.iters else []
    result = wait()
    if not result.updated:
        raise _NotFiniteError(
            f"step {step + 1}: the loss ({result.loss}) or the gradient's norm ({result.grad_norm}) is not finite, so the adapter was "
            f"left as it was; lower --learning-rate, and look at the rows {', '.join(row for batch in batches for row in batch.rows)}."
        )
    report.update(
        step + 1,
        loss=result.loss,
        learning_rate=rate,
        grad_norm=result.grad_norm,
        tokens=sum(batch.num_tokens for batch in batches),
        seconds=time.monotonic() - started,
        peak=backend.peak_memory(),
    )
    return following


def _last_good(output: Path, *, before: int | None = None) -> str:
    good = newest_valid(output / CHECKPOINTS, before=before)
    return f"The last good checkpoint is {good}" if good else "There is no good checkpoint yet"


def resume_command(output: Path) -> str:
    """The command that goes on with the run."""
    where = f" --output-dir {shlex.quote(str(output))}" if output != DEFAULT_OUTPUT else ""
    return f"mlx-fish train --resume{where}"


def _save(job: Job, backend: Backend, output: Path, step: int, state: dict[str, Any], *, after: int) -> None:
    """A checkpoint, and then the same adapter at the top of the folder."""
    arrays = backend.adapter_arrays()
    save_checkpoint(
        output / CHECKPOINTS,
        step,
        adapter=arrays,
        adapter_config=adapter_config(job),
        optimizer=backend.optimizer_arrays(),
        state={"run": run_record(job, {}), **state},
        keep=job.config.keep,
        after=after,
    )
    save_adapter(output, arrays, adapter_config(job))


def _close(job: Job, output: Path, results: dict[str, Any]) -> None:
    record = run_record(job, results)
    write_text(
        output / "README.md",
        adapter_card(Tuning.from_run(record, base=job.folder.name, license=license_of(job.folder.path))),
    )
    write_json(output / RUN_FILE, record)  # last: a record with results is that of a complete run
    say(f"\n  {SAMPLE_QUESTION}")
    say(f"  before: {results['before']}")
    say(f"  after:  {results['after']}\n")
    say(
        f"  {results['tokens_per_second']:.0f} tokens/s, peak {results['peak_bytes'] / 1e9:.2f} GB, {results['seconds']:.0f} s; saved in {output}/"
    )
    where = "" if str(output) == "finetuned_model" else f" --adapter {shlex.quote(str(output))}"
    say(
        f'\nNext:\n  mlx-fish generate{where} -p "{SAMPLE_QUESTION}"\n  mlx-fish evaluate{where}\n  mlx-fish fuse{where} --to-hf'
    )
