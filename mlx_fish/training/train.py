"""Run `mlx-fish train`, from the settings to an adapter with its model card. `loop.py` has the training loop."""

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
from mlx_fish.runs.folder import DEFAULT_OUTPUT, RUN_FILE, check_free, check_space, clear_run, locked, remove_leftovers
from mlx_fish.runs.record import run_record, write_run
from mlx_fish.runs.resume import (
    NEWEST,
    ResumePoint,
    check_arrays,
    check_unchanged,
    find_resume_point,
    recorded_base,
    recorded_data,
    resumed_config,
    run_folder,
)
from mlx_fish.signals import Interrupted, Stop, catching
from mlx_fish.storage.files import write_json, write_text
from mlx_fish.tracking.events import say
from mlx_fish.training.loop import make_updates, resume_command


def train(config: TrainConfig, *, dry_run: bool = False, force: bool = False) -> Path:
    """Train an adapter.

    Args:
        dry_run: check everything, and write nothing.
        force: train even if the plan says that the run cannot fit in memory.

    Returns:
        the output folder.

    Raises:
        FishError: the settings, files or rows are invalid, or the run cannot fit in memory (both found before the
            model loads); or a loss is not finite (the message names the step and the rows).
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; the completed updates are saved in a checkpoint.
    """
    output = Path(config.output_dir)
    choose_backend(config.backend)
    check_template_name(config.template)
    check_free(output, overwrite=config.overwrite)
    with catching() as stop:
        dataset = load_data(config)  # validate data before locating the model: errors show up within seconds
        job = make_job(config, find_model(config.model), dataset)
        describe(job)
        job = planned(job, force=force)
        if dry_run:
            say("Dry run: nothing was written.")
            return output
        with locked(output):
            # Check again: another process may have written before the lock was taken.
            check_free(output, overwrite=config.overwrite)
            _run_job(job, output, None, stop)
    return output


def resume(settings: dict[str, Any], checkpoint: str = NEWEST, *, dry_run: bool = False, force: bool = False) -> Path:
    """Resume a run. Losses and adapter are bit-identical to those of an uninterrupted run.

    Args:
        settings: settings to override; all others are those of the run.
        checkpoint: name, step number or path of a checkpoint; `NEWEST` is the newest valid one.
        dry_run, force: see `train`.

    Returns:
        the output folder.

    Raises:
        FishError: as in `train`; or a setting that affects training, the data or the base has changed.
        Interrupted: see `train`.
    """
    output = run_folder(settings, checkpoint)
    with catching() as stop, locked(output):
        point = find_resume_point(output, checkpoint)
        config = resumed_config(point, settings)
        choose_backend(config.backend)
        job = make_job(config, recorded_base(point, settings), load_data(config, recorded_data(point, settings)))
        check_unchanged(point, job, run_record(job, {}))
        check_arrays(point, job)
        if point.step >= job.iters and point.has_results:
            remove_leftovers(output)
            say(f"{output} is complete: all {job.iters} updates are done; to train longer, set a higher --iters.")
            return output
        describe(job)
        job = planned(job, force=force, resuming=True)
        say(f"  resuming    after {point.step} of {job.iters} updates")
        if dry_run:
            say("Dry run: nothing was written.")
        else:
            _run_job(job, output, point, stop)
    return output


def _run_job(job: Job, output: Path, point: ResumePoint | None, stop: Stop) -> None:
    """Load the model, train it and write the results. The caller holds the lock of the output folder."""
    check_space(output, num_parameters=job.spec.num_parameters, num_checkpoints=job.config.keep + 1)
    backend = load_backend(job.folder, lambda text: say(f"! {text}"), name=choose_backend(job.config.backend))
    say(f"  computing   {backend.name} on {backend.device}, {backend.dtype}")
    checkpoint = point.checkpoint if point else None
    arrays = checkpoint.adapter if checkpoint else initial_arrays(job.spec, job.config.seed)
    if point is None:
        clear_run(output)
    else:
        remove_leftovers(output)
    backend.attach(job.spec, arrays, loss=job.objective.loss, grad_checkpoint=job.config.grad_checkpoint == "on")
    if checkpoint is not None:
        backend.restore_optimizer(checkpoint.optimizer, checkpoint.step)
    write_run(job, output, {})
    try:
        results = make_updates(job, backend, output, checkpoint.state if checkpoint else {"step": 0}, stop)
        _write_results(job, output, results)
    except Interrupted:
        say(f"\nTo continue:\n  {resume_command(output)}")
        raise


def _write_results(job: Job, output: Path, results: dict[str, Any]) -> None:
    """Write the model card and the final run.json, and print the next commands."""
    record = run_record(job, results)
    write_text(
        output / "README.md",
        adapter_card(Tuning.from_run(record, base=job.folder.name, license=license_of(job.folder.path))),
    )
    write_json(output / RUN_FILE, record)  # last: a run.json with results marks a complete run
    flags = "" if output == DEFAULT_OUTPUT else f" --adapter {shlex.quote(str(output))}"
    question = shlex.quote(sample_question(job))
    say(
        f"\nNext:\n  mlx-fish generate{flags} -p {question}\n  mlx-fish evaluate{flags}\n  mlx-fish fuse{flags} --to-hf"
    )
