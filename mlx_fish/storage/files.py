"""Files and folders that appear whole or not at all. Knows nothing of what they hold."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlx_fish.errors import FishError


def is_path(text: str) -> bool:
    """Whether a file system could hold a file of this name: no NUL byte, no part longer than 255 bytes."""
    try:
        name = os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return b"\0" not in name and len(name) < 4096 and max(map(len, name.split(b"/"))) <= 255


def path_of(text: str) -> Path:
    """A path that stands in a JSON file of ours, whatever the locale then and now (see `write_text`)."""
    return Path(os.fsdecode(text.encode("utf-8", "surrogatepass")))


def is_leftover(name: str) -> bool:
    """Whether a name is one that a killed process leaves while writing (see `write_bytes` and `new_folder`)."""
    return name.startswith(".") and name.endswith((".partial", ".old"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside, flush, rename: a reader sees the old content or the new, never half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise FishError(f"cannot write {path}: {error.strerror or error}.") from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8. A path that the locale could not decode is in Python a text with lone surrogates: its bytes are written as they
    are when they are UTF-8, else what no UTF-8 file can hold is escaped."""
    try:
        content = text.encode("utf-8", "surrogateescape")
        content.decode("utf-8")
    except UnicodeError:
        content = text.encode("utf-8", "backslashreplace")
    write_bytes(path, content)


def write_json(path: Path, value: Any) -> None:
    """Indented UTF-8 JSON; NaN and infinities are refused, since other readers refuse them."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that somebody else may have written."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FishError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise FishError(f"{path} is not valid JSON ({error}); restore the file.") from error
    if not isinstance(value, dict):
        raise FishError(f"{path} should hold a JSON object, not {type(value).__name__}.")
    return value


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut (a no-op where folders cannot be opened)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_target(target: Path, *, marker: str, overwrite: bool) -> None:
    """Say before any work whether `new_folder` will be able to put its result at `target`.

    Args:
        marker: a file whose presence shows that the folder is one of ours; without it nothing is replaced,
            so that `--out ~ --overwrite` cannot remove a home folder.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise FishError(f"{target} is a file, a folder was expected; name another one with --out.")
    if not overwrite:
        raise FishError(f"{target} already exists; use --overwrite to replace it, or another --out.")
    if not (target / marker).is_file():
        raise FishError(
            f"{target} was not made by mlx-fish (no {marker} in it), so it is not replaced; use another --out."
        )


@contextmanager
def new_folder(target: Path, *, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success rename it into place, on failure remove it.

    A killed process leaves at most a hidden `.NAME.PID.partial` folder, never a half-made `target`.
    """
    target = Path(os.path.abspath(target))
    check_target(target, marker=marker, overwrite=overwrite)
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
    except OSError as error:
        raise FishError(f"cannot write into {target.parent}: {error.strerror or error}.") from error
    try:
        yield beside
        for file in sorted(beside.rglob("*")):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        sync_folder(beside)
        _put_in_place(beside, target)
    except OSError as error:
        raise FishError(f"cannot write {target}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _put_in_place(beside: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(beside, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
