"""One example of a data set: a conversation or a document, with the file and line that it came from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_fish.data.formats.dataset_info import Columns
from mlx_fish.errors import FishError

MAX_REPORTED = 20
_LONGEST_MISTAKE = 600


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. `input` is a user turn's further material, kept apart since templates differ on it."""

    role: str
    content: str
    input: str = ""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an answer, or one turn that is a document. `where` is `file:line`."""

    turns: tuple[Turn, ...]
    where: str


class RowError(Exception):
    """What is wrong with one row, without its place."""


@dataclass(frozen=True)
class RowKind:
    """What a row of a data set is.

    Attributes:
        parse: a parsed JSON value, and how its columns are called (None: recognise them) -> its turns. Raises RowError.
        required: the columns that an entry of dataset_info.json must name.
    """

    parse: Callable[[Any, Columns | None], tuple[Turn, ...]]
    required: tuple[str, ...]


@dataclass
class Mistakes:
    """Broken rows: how many, and the first `MAX_REPORTED` of them as `file:line: what, what was expected`."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, mistake: str) -> None:
        self.count += 1
        if self.count <= MAX_REPORTED:
            # A stranger's field names may hold line ends, or what would steer the terminal.
            shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in mistake)
            self.first.append(shown if len(shown) <= _LONGEST_MISTAKE else shown[:_LONGEST_MISTAKE] + "…")

    def refuse(self) -> None:
        """Raise a FishError that tells them together, if there are any."""
        if self.count:
            more = [f"… and {self.count - MAX_REPORTED} more"] if self.count > MAX_REPORTED else []
            raise FishError("\n".join(self.first + more))
