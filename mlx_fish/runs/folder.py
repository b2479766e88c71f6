"""The folder that a training run leaves behind: is it free, who may write to it, what of it is rubbish."""

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
_SPARE_BYTES = 16 << 20  # the log, the picture, the tokenizer, and room for the file system itself


def check_free(output: Path, *, overwrite: bool) -> None:
    """Refuse to train over a run, or over what is no run of ours."""
    if not is_path(str(output)):
        raise FishError("--output-dir: no folder can have this name; give a shorter one, of ordinary characters.")
    if not output.exists():
        return
    if not output.is_dir():
        raise FishError(f"--output-dir {output} is a file; name a folder.")
    if not _contents(output):
        return
    if not (output / RUN_FILE).is_file():
        raise FishError(
            f"--output-dir {output} holds files that are no run of mlx-fish (no {RUN_FILE}); name another folder."
        )
    if not overwrite:
        raise FishError(
            f"{output} already holds a run; use --resume to go on with it, --overwrite to replace it, or another --output-dir."
        )


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the run's folder, made when it is missing, for this process alone.

    The operating system drops the lock with the process, however it ends; the empty file that may stay is no lock.

    Raises:
        FishError: another process holds it, or it cannot be written.
    """
    lock = FileLock(output / LOCK_FILE, timeout=0, fallback_to_soft=False)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise FishError(f"another run is writing to {output}; wait for it, or name another --output-dir.") from error
    except OSError as error:
        raise FishError(f"cannot write into {output}: {error.strerror or error}.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            (output / LOCK_FILE).unlink()  # while it is held: nobody else can hold a file that is gone
            output.rmdir()  # only if nothing was written
        lock.release()


def prepare(output: Path) -> None:
    """Empty the locked folder of an earlier run, which `check_free` allowed to replace.

    The weights go first and run.json last: whenever this is cut short, what is left is no adapter, and still known as a run.
    """
    order = sorted(_contents(output), key=lambda path: (path.name != WEIGHTS_FILE, path.name == RUN_FILE, path.name))
    try:
        for path in [*leftovers(output), *order]:
            _remove(path)
    except OSError as error:
        raise FishError(f"cannot write {output}: {error.strerror or error}.") from error


def leftovers(output: Path) -> list[Path]:
    """What a killed process left half-written; rubbish for whoever holds the lock."""
    return [path for folder in (output, output / CHECKPOINTS) for path in folder.glob(".*") if is_leftover(path.name)]


def clean(output: Path) -> None:
    """Remove the leftovers."""
    for path in leftovers(output):
        with suppress(OSError):
            _remove(path)


def check_space(output: Path, *, num_parameters: int, num_checkpoints: int) -> None:
    """Refuse a run whose checkpoints (12 bytes a parameter) and adapter (4) would not fit on the disk."""
    needed = num_parameters * (12 * num_checkpoints + 2 * 4) + _SPARE_BYTES
    free = shutil.disk_usage(output).free
    if free < needed:
        raise FishError(
            f"{output} needs about {needed / 1e6:.0f} MB for the adapter and {num_checkpoints} checkpoints, and the disk has "
            f"{free / 1e6:.0f} MB left; free some space, or choose another --output-dir."
        )


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of an adapter that `mlx-fish train` wrote; empty beside another trainer's."""
    path = folder / RUN_FILE
    return read_json(path) if path.is_file() else {}


def find_adapter(adapter: Path | None) -> Path | None:
    """The adapter folder asked for, else the default one when a run left it there."""
    if adapter is None:
        return DEFAULT_OUTPUT if (DEFAULT_OUTPUT / WEIGHTS_FILE).is_file() else None
    if not is_adapter(adapter):
        near = (
            [path.parent.name for path in adapter.parent.glob(f"*/{WEIGHTS_FILE}")] if adapter.parent.is_dir() else []
        )
        raise FishError(
            f"--adapter {adapter}: a folder with {WEIGHTS_FILE} and its config was expected; run `mlx-fish train` first."
            f"{did_you_mean(adapter.name, near)}"
        )
    return adapter


def _contents(output: Path) -> list[Path]:
    return [path for path in output.iterdir() if path.name != LOCK_FILE and not is_leftover(path.name)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
