"""Find the checkpoint for `train --resume`, and check that settings, data and base are those of the original run.

Every checkpoint contains the run's record (the run.json written at the start of the run) next to the state of the
training loop, so it can be checked without other files. Settings that are not overridden are read from this record.
Independent of the training loop.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fish.adapters.spec import Arrays
from mlx_fish.config import TrainConfig, flag_name
from mlx_fish.errors import FishError
from mlx_fish.models.folder import ModelFolder
from mlx_fish.models.hub import find_model
from mlx_fish.planning.job import Job
from mlx_fish.runs.checkpoint import Checkpoint, checkpoints, damage, find_checkpoint, load_checkpoint
from mlx_fish.runs.folder import CHECKPOINTS, DEFAULT_OUTPUT, RUN_FILE, read_run
from mlx_fish.runs.record import data_path
from mlx_fish.storage.files import path_of
from mlx_fish.tracking.events import say

NEWEST = "newest"
# Settings that may change on a resume: they affect no completed update. Data and model are compared by content.
CHANGEABLE_SETTINGS = {
    "iters",
    "epochs",
    "save_every",
    "keep",
    "eval_every",
    "logging_steps",
    "output_dir",
    "data",
    "model",
    "backend",
}


@dataclass(frozen=True)
class ResumePoint:
    """The point from which a run is resumed.

    Attributes:
        output: the run's folder.
        record: the run.json written at the start of the run.
        checkpoint: None if the run ended before its first checkpoint; it then restarts with the recorded settings.
    """

    output: Path
    record: dict[str, Any]
    checkpoint: Checkpoint | None

    @property
    def step(self) -> int:
        """Number of completed updates."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def has_results(self) -> bool:
        """Whether run.json has results, which means that the run was completed."""
        return bool(read_run(self.output).get("results"))


def run_folder(settings: dict[str, Any], checkpoint: str) -> Path:
    """Return the folder of the run to resume: `--output-dir`, else the run that contains the checkpoint's path.

    Raises:
        FishError: the folder contains no run, or does not contain the checkpoint.
    """
    path = Path(checkpoint)
    parent_run = path.parent.parent if path.parent.name == CHECKPOINTS else None
    output = Path(settings.get("output_dir", parent_run or DEFAULT_OUTPUT))
    if parent_run is not None and parent_run.resolve() != output.resolve():
        raise FishError(f"--resume {checkpoint} is not in --output-dir {output}; set only one of the two.")
    if not (output / RUN_FILE).is_file():
        raise FishError(
            f"{output} contains no run to resume (no {RUN_FILE}); run `mlx-fish train` first, or set --output-dir."
        )
    if (output / CHECKPOINTS).is_symlink():
        raise FishError(
            f"{output / CHECKPOINTS} is a symbolic link; replace it with a folder that contains the checkpoints."
        )
    return output


def find_resume_point(output: Path, name: str) -> ResumePoint:
    """Find the checkpoint to resume from.

    Args:
        name: name, step number or path of a checkpoint. `NEWEST` is the newest valid one; damaged newer ones are
            reported.

    Raises:
        FishError: the checkpoint does not exist, is damaged, or was written by another version.
    """
    folder = output / CHECKPOINTS
    path = find_checkpoint(folder, name) if name != NEWEST else _newest_valid(folder)
    if path is None:
        say(f"! {output} has no checkpoint yet, so the run restarts from the beginning")
        return ResumePoint(output, _checked(read_run(output), output / RUN_FILE), None)
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint.state.get("report"), dict):
        raise FishError(f"{path} was written by another version of mlx-fish; start a new run with --overwrite.")
    return ResumePoint(output, _checked(checkpoint.state.get("run"), path), checkpoint)


def _newest_valid(folder: Path) -> Path | None:
    """Return the newest valid checkpoint, and report the damaged ones that are newer. None if there are none at all."""
    paths = checkpoints(folder)
    for path in reversed(paths):
        problem = damage(path)
        if problem is None:
            return path
        say(f"! {path} is damaged ({problem}) and is skipped")
    if paths:
        raise FishError(f"{folder} has no valid checkpoint ({len(paths)} damaged); start a new run with --overwrite.")
    return None


def resumed_config(point: ResumePoint, settings: dict[str, Any]) -> TrainConfig:
    """Return the settings of the run, overridden by `settings`.

    Raises:
        FishError: an overriding setting differs from the run's, and affects training.
    """
    recorded = point.record["settings"]
    if settings.get("grad_checkpoint") == "auto":  # it was resolved when the run started
        settings = {name: value for name, value in settings.items() if name != "grad_checkpoint"}
    changes = [
        f"{flag_name(name)} {value} (was {recorded.get(name)})"
        for name, value in settings.items()
        if name not in CHANGEABLE_SETTINGS and value != recorded.get(name)
    ]
    if changes:
        raise _change_error(point, changes)
    if "epochs" in settings and "iters" not in settings:
        recorded = {**recorded, "iters": None}
    if {"iters", "epochs"} & set(settings):
        # By default, a short run validates on fewer rows. Keep their number, so that the losses stay comparable.
        recorded = {**recorded, "eval_rows": point.record["data"]["validation_rows"] or None}
    try:
        return TrainConfig(**{**recorded, **settings, "output_dir": str(point.output), "overwrite": False})
    except TypeError as error:
        raise FishError(
            f"{point.output} was trained by another version of mlx-fish ({error}); start a new run with --overwrite."
        ) from error


def recorded_base(point: ResumePoint, settings: dict[str, Any]) -> ModelFolder:
    """Find the base model: `model` in `settings`, else the folder that the run used, else the model that it names."""
    base = point.record["base"]
    path = path_of(base["path"])
    if settings.get("model") is not None:
        path = find_model(settings["model"]).path
    elif not (path / "config.json").is_file():
        return find_model(base["name"], revision=base["revision"])
    # Keep the recorded name: the adapter's config contains it.
    return ModelFolder(path, base["name"], base["revision"])


def recorded_data(point: ResumePoint, settings: dict[str, Any]) -> Path | None:
    """Return the path of the run's data, or None if `settings` has other data or an older version did not record it."""
    return None if settings.get("data") is not None else data_path(point.record)


def check_unchanged(point: ResumePoint, job: Job, record: dict[str, Any]) -> None:
    """Check that a job continues the run: same rows, same base, and at least as many updates.

    Args:
        record: the content of run.json for the job.

    Raises:
        FishError: something has changed; the message lists all changes.
    """
    old, new = point.record, record
    changes = [
        f"the data file {name} {'has changed' if name in new['data']['sha256'] else 'is missing'}"
        for name, digest in old["data"]["sha256"].items()
        if new["data"]["sha256"].get(name) != digest
    ]
    if not changes and old["data"]["tokens_sha256"] != new["data"]["tokens_sha256"]:
        changes.append("the rows yield different tokens (the tokenizer, its template or dataset_info.json has changed)")
    if any(old["base"].get(key) != new["base"][key] for key in ("fingerprint", "dtype", "quantization")):
        changes.append(f"the base model {job.folder.name} has changed")
    if job.iters < old["iters"]:
        changes.append(f"{job.iters} updates (was {old['iters']}; the number can be raised, not lowered)")
    if changes:
        raise _change_error(point, changes)
    if job.iters > old["iters"] and job.config.schedule != "constant":
        say(
            f"! the run was extended from {old['iters']} to {job.iters} updates: the learning rate now follows the schedule of a "
            f"{job.iters}-update run"
        )
    if old["settings"].get("backend") != job.config.backend or any(
        old[key] != new[key] for key in ("packages", "machine")
    ):
        say(
            "! the backend, the machine or package versions have changed: the run continues, but is not bit-identical to an "
            "uninterrupted one"
        )


def check_arrays(point: ResumePoint, job: Job) -> None:
    """Check that the checkpoint has exactly the tensors of the job's adapter and of its AdamW moments.

    Raises:
        FishError: names or shapes differ.
    """
    if point.checkpoint is None:
        return
    expected = job.spec.shapes
    moments = {f"{moment}.{name}": shape for moment in "mv" for name, shape in expected.items()}
    if _shapes(point.checkpoint.adapter) != expected or _shapes(point.checkpoint.optimizer) != moments:
        raise FishError(
            f"the checkpoint of step {point.step} in {point.output} does not fit the model; start a new run with --overwrite."
        )


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _checked(record: Any, path: Path) -> dict[str, Any]:
    """Return the record if it has everything that resuming needs.

    Args:
        path: the file or checkpoint that contains the record, for the error message.
    """
    try:
        known_settings = {item.name for item in dataclasses.fields(TrainConfig)}
        is_valid = (
            set(record["settings"]) <= known_settings
            and isinstance(record["iters"], int)
            and isinstance(record["base"]["path"], str)
            and isinstance(record["base"]["name"], str)
            and isinstance(record["data"]["sha256"], dict)
            and {"tokens_sha256", "validation_rows"} <= set(record["data"])
            and "revision" in record["base"]
            and {"packages", "machine"} <= set(record)
        )
    except (KeyError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise FishError(f"{path} was written by another version of mlx-fish; start a new run with --overwrite.")
    return dict(record)


def _change_error(point: ResumePoint, changes: list[str]) -> FishError:
    return FishError(
        f"{point.output} cannot be resumed with these changes: {'; '.join(changes)}; undo them, or start a new run with "
        "--overwrite."
    )
