"""Run the whole of `mlx-fish train`, from settings to an adapter with its card; `loop.py` makes the updates."""

import shlex
from pathlib import Path
from typing import Any

from mlx_fish.adapters.spec import initial_arrays
from mlx_fish.backends.choose import choose_backend, load_backend
from mlx_fish.config import TrainConfig
from mlx_fish.data.templates.template import check_template_name
from mlx_fish.models.hub import find_model
from mlx_fish.planning.job import Job, describe, load_data, make_job, sample_question
from mlx_fish.planning.plan import planned
from mlx_fish.runs.card import Tuning, adapter_card, license_of
from mlx_fish.runs.folder import DEFAULT_OUTPUT, RUN_FILE, check_free, check_space, clean, locked, prepare
from mlx_fish.runs.record import run_record, write_run
from mlx_fish.runs.resume import (
    NEWEST,
    Point,
    check_arrays,
    check_same,
    continued,
    find_point,
    recorded_base,
    recorded_data,
    run_folder,
)
from mlx_fish.signals import Interrupted, Stop, catching
from mlx_fish.storage.files import write_json, write_text
from mlx_fish.tracking.events import say
from mlx_fish.training.loop import make_updates, resume_command


def train(config: TrainConfig, *, dry_run: bool = False, force: bool = False) -> Path:
    """Train an adapter; returns the output folder.

    Args:
        dry_run: check everything, write nothing.
        force: train even what the plan says cannot fit in memory.

    Raises:
        FishError: any mistake in the settings, files or rows, before the model loads; a run that cannot fit in memory; a
            non-finite loss, naming step and rows.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; the updates done are in a checkpoint.
    """
    output = Path(config.output_dir)
    choose_backend(config.backend)
    check_template_name(config.template)
    check_free(output, overwrite=config.overwrite)
    with catching() as stop:
        dataset = load_data(config)  # before the model: its mistakes are found in seconds
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
        settings: those asked for; the run's own hold for the rest.
        checkpoint: its name, number or path; `NEWEST` is the newest complete one.

    Raises:
        FishError: also when a setting, the data or the base is not what the run began with.
    """
    output = run_folder(settings, checkpoint)
    with catching() as stop, locked(output):
        point = find_point(output, checkpoint)
        config = continued(point, settings)
        choose_backend(config.backend)
        job = make_job(config, recorded_base(point, settings), load_data(config, recorded_data(point, settings)))
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
    """Load the model, make the updates, and write what a run leaves; the folder is ours."""
    check_space(output, num_parameters=job.spec.num_parameters, num_checkpoints=job.config.keep + 1)
    backend = load_backend(job.folder, lambda text: say(f"! {text}"), name=choose_backend(job.config.backend))
    say(f"  computing   {backend.name} on {backend.device}, {backend.dtype}")
    checkpoint = point.checkpoint if point else None
    arrays = checkpoint.adapter if checkpoint else initial_arrays(job.spec, job.config.seed)
    if point is None:
        prepare(output)
    else:
        clean(output)
    backend.attach(job.spec, arrays, loss=job.objective.loss, grad_checkpoint=job.config.grad_checkpoint == "on")
    if checkpoint is not None:
        backend.restore_optimizer(checkpoint.optimizer, checkpoint.step)
    write_run(job, output, {})
    try:
        results = make_updates(job, backend, output, checkpoint.state if checkpoint else {"step": 0}, stop)
        _close(job, output, results)
    except Interrupted:
        say(f"\nTo go on:\n  {resume_command(output)}")
        raise


def _close(job: Job, output: Path, results: dict[str, Any]) -> None:
    record = run_record(job, results)
    write_text(
        output / "README.md",
        adapter_card(Tuning.from_run(record, base=job.folder.name, license=license_of(job.folder.path))),
    )
    write_json(output / RUN_FILE, record)  # last: a record with results is that of a complete run
    where = "" if output == DEFAULT_OUTPUT else f" --adapter {shlex.quote(str(output))}"
    question = shlex.quote(sample_question(job))
    say(
        f"\nNext:\n  mlx-fish generate{where} -p {question}\n  mlx-fish evaluate{where}\n  mlx-fish fuse{where} --to-hf"
    )
