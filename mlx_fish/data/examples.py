"""Data set examples (conversations or documents) with their file and line, and the errors of invalid rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_fish.data.formats.dataset_info import Columns
from mlx_fish.errors import FishError

MAX_REPORTED = 20
_MAX_MISTAKE_LENGTH = 600  # characters


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: system, user or assistant; `document` for a document.
        input: additional input of a user turn, kept separate because templates format it differently.
    """

    role: str
    content: str
    input: str = ""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an assistant turn, or a document as a single turn.

    Attributes:
        where: `file:line` of the row.
    """

    turns: tuple[Turn, ...]
    where: str


class RowError(Exception):
    """An invalid row. The message does not include its file and line."""


@dataclass(frozen=True)
class RowKind:
    """The kind of rows a data set contains: conversations or documents.

    Attributes:
        parse: converts a parsed JSON value into turns, given its column names (None: infer them). Raises
            RowError.
        required: the columns that an alpaca entry in dataset_info.json must name.
    """

    parse: Callable[[Any, Columns | None], tuple[Turn, ...]]
    required: tuple[str, ...]


@dataclass
class Mistakes:
    """Collected errors of invalid rows.

    Attributes:
        count: the number of errors.
        first: the first `MAX_REPORTED` of them, each as `file:line: what is wrong; what was expected`.
    """

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, mistake: str) -> None:
        """Count an error, and keep its message if it is among the first `MAX_REPORTED`."""
        self.count += 1
        if self.count <= MAX_REPORTED:
            # Field names in untrusted data may contain newlines or terminal escape sequences.
            escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in mistake)
            self.first.append(escaped if len(escaped) <= _MAX_MISTAKE_LENGTH else escaped[:_MAX_MISTAKE_LENGTH] + "…")

    def refuse(self) -> None:
        """Raise one FishError that lists the collected errors, if there are any."""
        if self.count:
            more = [f"… and {self.count - MAX_REPORTED} more"] if self.count > MAX_REPORTED else []
            raise FishError("\n".join(self.first + more))
