"""Watch a process touch the disk, and end it (`os._exit`, like a kill) at the touch asked for. The product needs no seam for it:
Python's audit events tell of opening, renaming and removing, and `open` and `os.fsync` are replaced in the child."""

import builtins
import os
import sys
from pathlib import Path
from typing import Any

EXIT_CODE = 77
_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


class Touches:
    """Counts the touches under a folder, dies at number `die_at` (just before it, or with half of a write done), and keeps a list of
    renames whose content was not yet flushed: a power cut could leave such a file empty."""

    def __init__(self, folder: Path, die_at: int = 0):
        self.folder = str(folder)
        self.die_at = die_at
        self.count = 0
        self.unflushed_renames: list[str] = []
        self._dirty: set[int] = set()

    def install(self) -> None:
        """For good: an audit hook cannot be taken away. Call it in a child."""
        self._open = builtins.open
        builtins.open = self.open  # type: ignore[assignment]
        os.fsync = self.fsync
        sys.addaudithook(self.audit)

    def touch(self) -> bool:
        self.count += 1
        return self.count == self.die_at

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS:
            return
        if self.touch():
            os._exit(EXIT_CODE)
        if event == "os.rename":
            source = Path(os.fsdecode(arguments[0]))
            files = [source] if source.is_file() else list(source.rglob("*"))
            self.unflushed_renames += [
                f"{file} -> {arguments[1]}" for file in files if file.stat().st_ino in self._dirty
            ]

    def fsync(self, handle: int) -> None:
        if self.touch():
            os._exit(EXIT_CODE)
        self._dirty.discard(os.fstat(handle).st_ino)

    def open(self, path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        inside = not isinstance(path, int) and os.path.abspath(path).startswith(self.folder)
        if inside and set(mode) & set("wax+") and self.touch():
            os._exit(EXIT_CODE)
        file = self._open(path, mode, *arguments, **named)
        if inside and set(mode) & set("wax+"):
            return Halving(file, self)
        return file

    def wrote(self, file: Any) -> None:
        self._dirty.add(os.fstat(file.fileno()).st_ino)


class Halving:
    """A file whose `write` may die with half of its content written."""

    def __init__(self, file: Any, touches: Touches):
        self._file, self._touches = file, touches

    def write(self, content: Any) -> Any:
        self._touches.wrote(self._file)
        if self._touches.touch():
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            os._exit(EXIT_CODE)
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Halving":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
