"""Write files and folders atomically, and read JSON. Independent of what the files contain."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlx_fish.errors import FishError


def is_path(text: str) -> bool:
    """Return whether `text` is a valid path: no NUL byte, no component longer than 255 bytes."""
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return b"\0" not in encoded and len(encoded) < 4096 and max(map(len, encoded.split(b"/"))) <= 255


def path_of(text: str) -> Path:
    """Return the path for a string read from JSON that `write_json` wrote, independent of the locale."""
    return Path(os.fsdecode(text.encode("utf-8", "surrogatepass")))


def is_leftover(name: str) -> bool:
    """Return whether `name` matches the temporary files and folders that a killed process may leave behind."""
    return name.startswith(".") and name.endswith((".partial", ".old"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new content, never part of it.

    The content goes to a temporary file in the same folder, is synced to disk, and is then renamed to `path`.

    Raises:
        FishError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise FishError(f"cannot write {path}: {error.strerror or error}.") from error


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically.

    Python represents a path that the locale cannot decode as a string with lone surrogates. Its original
    bytes are written unchanged if they are valid UTF-8; otherwise the surrogates are written as backslash
    escapes.
    """
    try:
        content = text.encode("utf-8", "surrogateescape")
        content.decode("utf-8")
    except UnicodeError:
        content = text.encode("utf-8", "backslashreplace")
    write_bytes(path, content)


def write_json(path: Path, value: Any) -> None:
    """Write indented UTF-8 JSON, atomically.

    Raises:
        ValueError: `value` contains NaN or an infinity, which other JSON readers reject.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from an untrusted file.

    Raises:
        FishError: the file cannot be read, is not valid JSON, or contains something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FishError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise FishError(f"{path} is not valid JSON ({error}); restore the file.") from error
    if not isinstance(value, dict):
        raise FishError(f"{path} should contain a JSON object, not {type(value).__name__}.")
    return value


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that a rename inside it survives a power cut.

    Does nothing on Windows, where folders cannot be opened.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(target: Path, *, marker: str, overwrite: bool) -> None:
    """Check, before any work starts, that `new_folder` may create or replace `target`.

    Args:
        marker: name of a file that only folders written by mlx-fish contain. A folder without it is never
            replaced, so that `--out ~ --overwrite` cannot delete a home folder.

    Raises:
        FishError: `target` is a file, exists and `overwrite` is not set, or lacks the marker.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise FishError(f"{target} is a file, but a folder was expected; choose another --out.")
    if not overwrite:
        raise FishError(f"{target} already exists; use --overwrite to replace it, or another --out.")
    if not (target / marker).is_file():
        raise FishError(
            f"{target} was not made by mlx-fish (no {marker} in it), so it is not replaced; use another --out."
        )


@contextmanager
def new_folder(target: Path, *, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Create a folder atomically: yield a temporary folder, and rename it to `target` on success.

    The temporary folder is empty, next to `target`, and deleted on failure. A killed process leaves at most a
    hidden `.NAME.PID.partial` folder, never an incomplete `target`.

    Raises:
        FishError: `check_target` rejects `target`, or a file cannot be written.
    """
    target = Path(os.path.abspath(target))
    check_target(target, marker=marker, overwrite=overwrite)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise FishError(f"cannot write into {target.parent}: {error.strerror or error}.") from error
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        sync_folder(temporary)
        _replace_folder(temporary, target)
    except OSError as error:
        raise FishError(f"cannot write {target}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`, moving an existing `target` aside first."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
