"""Manage the output folder of a training run: checks before writing, the lock, leftovers and disk space."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlx_fish.adapters.peft import WEIGHTS_FILE, is_adapter
from mlx_fish.errors import FishError, did_you_mean
from mlx_fish.storage.files import is_leftover, is_path, read_json

DEFAULT_OUTPUT = Path("finetuned_model")
RUN_FILE = "run.json"
LOCK_FILE = ".lock"
CHECKPOINTS = "checkpoints"
_EXTRA_BYTES = 16 << 20  # allowance for the log, the plot, the tokenizer and the overhead of the file system


def check_free(output: Path, *, overwrite: bool) -> None:
    """Check that a new run may write to a folder.

    Args:
        overwrite: accept a folder that contains an earlier run.

    Raises:
        FishError: the name is invalid, the path is a file, the folder contains files that are not a run, or it
            contains a run and `overwrite` is False.
    """
    if not is_path(str(output)):
        raise FishError("--output-dir is not a valid folder name; use a shorter one with ordinary characters.")
    if not output.exists():
        return
    if not output.is_dir():
        raise FishError(f"--output-dir {output} is a file; choose a folder.")
    if not _contents(output):
        return
    if not (output / RUN_FILE).is_file():
        raise FishError(
            f"--output-dir {output} contains files but no run of mlx-fish (no {RUN_FILE}); choose another folder."
        )
    if not overwrite:
        raise FishError(
            f"{output} already contains a run; use --resume to continue it, --overwrite to replace it, or another --output-dir."
        )


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Create a run's folder if it does not exist, and lock it for this process.

    The operating system releases the lock when the process ends, whatever the reason. An empty lock file that is
    left behind does not lock the folder.

    Raises:
        FishError: another process holds the lock, or the folder cannot be written.
    """
    lock = FileLock(output / LOCK_FILE, timeout=0, fallback_to_soft=False)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise FishError(f"another run is writing to {output}; wait for it, or choose another --output-dir.") from error
    except OSError as error:
        raise FishError(f"cannot write into {output}: {error.strerror or error}.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            (output / LOCK_FILE).unlink()  # before the release, so that no other process can lock a deleted file
            output.rmdir()  # succeeds only if nothing was written
        lock.release()


def clear_run(output: Path) -> None:
    """Delete an earlier run from its locked folder, after `check_free` allowed it.

    The weights are deleted first and run.json last: if the process is killed in between, the folder has no adapter
    but is still recognised as a run.
    """
    paths = sorted(_contents(output), key=lambda path: (path.name != WEIGHTS_FILE, path.name == RUN_FILE, path.name))
    try:
        for path in [*leftovers(output), *paths]:
            _remove(path)
    except OSError as error:
        raise FishError(f"cannot write {output}: {error.strerror or error}.") from error


def leftovers(output: Path) -> list[Path]:
    """Return the incomplete files of killed processes. The holder of the lock may delete them."""
    return [path for folder in (output, output / CHECKPOINTS) for path in folder.glob(".*") if is_leftover(path.name)]


def remove_leftovers(output: Path) -> None:
    """Delete the incomplete files of killed processes."""
    for path in leftovers(output):
        with suppress(OSError):
            _remove(path)


def check_space(output: Path, *, num_parameters: int, num_checkpoints: int) -> None:
    """Check that the checkpoints (12 bytes per trainable parameter each) and the adapter (4 bytes) fit on the disk.

    Args:
        num_parameters: number of trainable parameters.
        num_checkpoints: maximum number of checkpoints that exist at the same time.

    Raises:
        FishError: the disk has too little free space.
    """
    # The adapter counts twice: the old file exists until the new one has replaced it.
    needed = num_parameters * (12 * num_checkpoints + 2 * 4) + _EXTRA_BYTES
    free = shutil.disk_usage(output).free
    if free < needed:
        raise FishError(
            f"{output} needs about {needed / 1e6:.0f} MB for the adapter and {num_checkpoints} checkpoints, but the disk has only "
            f"{free / 1e6:.0f} MB free; free some space, or choose another --output-dir."
        )


def read_run(folder: Path) -> dict[str, Any]:
    """Read the run.json of an adapter folder. Returns an empty dict for adapters of other trainers, which have none."""
    path = folder / RUN_FILE
    return read_json(path) if path.is_file() else {}


def find_adapter(adapter: Path | None) -> Path | None:
    """Find the adapter folder: `adapter` if set, else the default output folder if it has an adapter, else None.

    Raises:
        FishError: `adapter` is not an adapter folder.
    """
    if adapter is None:
        return DEFAULT_OUTPUT if (DEFAULT_OUTPUT / WEIGHTS_FILE).is_file() else None
    if not is_adapter(adapter):
        siblings = (
            [path.parent.name for path in adapter.parent.glob(f"*/{WEIGHTS_FILE}")] if adapter.parent.is_dir() else []
        )
        raise FishError(
            f"--adapter {adapter}: expected a folder with {WEIGHTS_FILE} and its config; run `mlx-fish train` first."
            f"{did_you_mean(adapter.name, siblings)}"
        )
    return adapter


def _contents(output: Path) -> list[Path]:
    """Return the files and folders of a run, without the lock and leftovers."""
    return [path for path in output.iterdir() if path.name != LOCK_FILE and not is_leftover(path.name)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
