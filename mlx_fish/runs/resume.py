"""What `train --resume` goes on from, and the proof that settings, data and base are those the run began with.

Every checkpoint holds the run's record (what run.json held when the run began) beside the loop's state, so it can be judged alone.
What is not asked for again is taken from there. Knows nothing of the loop.
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
# These may differ from the run's own: they change no number of what is trained. Data and model are compared by content.
FREE = {
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
class Point:
    """Where a run goes on.

    Attributes:
        output: the run's folder.
        record: what run.json held when the run began.
        checkpoint: None: the run ended before its first one, and starts again with the settings of its record.
    """

    output: Path
    record: dict[str, Any]
    checkpoint: Checkpoint | None

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def has_results(self) -> bool:
        """The run came to its end once, and left its results in run.json."""
        return bool(read_run(self.output).get("results"))


def run_folder(settings: dict[str, Any], checkpoint: str) -> Path:
    """The folder of the run: `--output-dir`, else the one that holds the checkpoint named by a path."""
    path = Path(checkpoint)
    inside = path.parent.parent if path.parent.name == CHECKPOINTS else None
    output = Path(settings.get("output_dir", inside or DEFAULT_OUTPUT))
    if inside is not None and inside.resolve() != output.resolve():
        raise FishError(f"--resume {checkpoint} lies outside --output-dir {output}; name one of the two.")
    if not (output / RUN_FILE).is_file():
        raise FishError(
            f"{output} holds no run to resume (no {RUN_FILE}); run `mlx-fish train`, or name its --output-dir."
        )
    if (output / CHECKPOINTS).is_symlink():
        raise FishError(f"{output / CHECKPOINTS} is a link to another place; move the checkpoints themselves there.")
    return output


def find_point(output: Path, name: str) -> Point:
    """The checkpoint to go on from: the one named, else the newest whole one, saying which newer ones are damaged."""
    folder = output / CHECKPOINTS
    chosen = find_checkpoint(folder, name) if name != NEWEST else _newest_whole(folder)
    if chosen is None:
        say(f"! {output} has no checkpoint yet, so the run starts again from its beginning")
        return Point(output, _checked(read_run(output), output / RUN_FILE), None)
    checkpoint = load_checkpoint(chosen)
    if not isinstance(checkpoint.state.get("report"), dict):
        raise FishError(f"{chosen} is no checkpoint of this version of mlx-fish; start anew with --overwrite.")
    return Point(output, _checked(checkpoint.state.get("run"), chosen), checkpoint)


def _newest_whole(folder: Path) -> Path | None:
    found = checkpoints(folder)
    for path in reversed(found):
        wrong = damage(path)
        if wrong is None:
            return path
        say(f"! {path} is damaged ({wrong}) and is passed over")
    if found:
        raise FishError(f"none of the {len(found)} checkpoints in {folder} is whole; start anew with --overwrite.")
    return None


def continued(point: Point, settings: dict[str, Any]) -> TrainConfig:
    """The run's own settings, with those asked for now.

    Raises:
        FishError: one that is asked for differs from the run's own, and would change what is trained.
    """
    recorded = point.record["settings"]
    if settings.get("grad_checkpoint") == "auto":  # decided when the run began
        settings = {name: value for name, value in settings.items() if name != "grad_checkpoint"}
    changes = [
        f"{flag_name(name)} {value} (it was {recorded.get(name)})"
        for name, value in settings.items()
        if name not in FREE and value != recorded.get(name)
    ]
    if changes:
        raise _changed(point, changes)
    if "epochs" in settings and "iters" not in settings:
        recorded = {**recorded, "iters": None}
    if {"iters", "epochs"} & set(settings):
        # By default a short run validates fewer rows, and a longer one must not compare its losses with those of others.
        recorded = {**recorded, "eval_rows": point.record["data"]["validation_rows"] or None}
    try:
        return TrainConfig(**{**recorded, **settings, "output_dir": str(point.output), "overwrite": False})
    except TypeError as error:
        raise FishError(
            f"{point.output} was trained by another version of mlx-fish ({error}); start anew with --overwrite."
        ) from error


def recorded_base(point: Point, settings: dict[str, Any]) -> ModelFolder:
    """The base asked for, else the folder that the run used, else the model that it names."""
    base = point.record["base"]
    path = path_of(base["path"])
    if settings.get("model") is not None:
        path = find_model(settings["model"]).path
    elif not (path / "config.json").is_file():
        return find_model(base["name"], revision=base["revision"])
    return ModelFolder(path, base["name"], base["revision"])  # the name as it was: it stands in the adapter's config


def recorded_data(point: Point, settings: dict[str, Any]) -> Path | None:
    """Where the run found its data; None where other data are asked for, or an older version did not note it."""
    return None if settings.get("data") is not None else data_path(point.record)


def check_same(point: Point, job: Job, record: dict[str, Any]) -> None:
    """The job continues the run: the same rows, base and layers, and no fewer updates.

    Args:
        record: what run.json would hold for the job.

    Raises:
        FishError: naming everything that has changed.
    """
    old, new = point.record, record
    changes = [
        f"the data file {name} {'has changed' if name in new['data']['sha256'] else 'is missing'}"
        for name, digest in old["data"]["sha256"].items()
        if new["data"]["sha256"].get(name) != digest
    ]
    if not changes and old["data"]["tokens_sha256"] != new["data"]["tokens_sha256"]:
        changes.append("the rows come to other tokens (the tokenizer, its template or dataset_info.json has changed)")
    if any(old["base"].get(key) != new["base"][key] for key in ("fingerprint", "dtype", "quantization")):
        changes.append(f"the base model {job.folder.name} is not the same as before")
    if job.iters < old["iters"]:
        changes.append(f"{job.iters} updates (it was {old['iters']}, which can be raised but not lowered)")
    if changes:
        raise _changed(point, changes)
    if job.iters > old["iters"] and job.config.schedule != "constant":
        say(
            f"! {old['iters']} updates became {job.iters}: from here on the learning rate is that of a run of {job.iters}"
        )
    if old["settings"].get("backend") != job.config.backend or any(
        old[key] != new[key] for key in ("packages", "machine")
    ):
        say(
            "! the run began on another backend or machine, or with other versions, so its numbers go on, but not to the last bit"
        )


def check_arrays(point: Point, job: Job) -> None:
    """The checkpoint's tensors are those of the job's adapter and of its moments.

    Raises:
        FishError: some other tensors lie there.
    """
    if point.checkpoint is None:
        return
    expected = job.spec.shapes
    moments = {f"{moment}.{name}": shape for moment in "mv" for name, shape in expected.items()}
    if _shapes(point.checkpoint.adapter) != expected or _shapes(point.checkpoint.optimizer) != moments:
        raise FishError(f"the checkpoint of step {point.step} in {point.output} does not fit the model; start anew.")


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _checked(record: Any, place: Path) -> dict[str, Any]:
    """The parts of a record that resuming needs, all there."""
    try:
        known = {item.name for item in dataclasses.fields(TrainConfig)}
        sound = (
            set(record["settings"]) <= known
            and isinstance(record["iters"], int)
            and isinstance(record["base"]["path"], str)
            and isinstance(record["base"]["name"], str)
            and isinstance(record["data"]["sha256"], dict)
            and {"tokens_sha256", "validation_rows"} <= set(record["data"])
            and "revision" in record["base"]
            and {"packages", "machine"} <= set(record)
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise FishError(f"{place} was written by another version of mlx-fish; start anew with --overwrite.")
    return dict(record)


def _changed(point: Point, changes: list[str]) -> FishError:
    return FishError(
        f"{point.output} cannot go on as it began, because of {'; '.join(changes)}; "
        "put that back, or start anew with --overwrite."
    )
