"""Files -> Examples, each with its file and line. Knows nothing of tokens or templates.

Row shapes read: `question/answer(/input)`, `instruction/input/output` (with `system` and `history`), `prompt/completion`,
`messages` (role/content) and `conversations` (from/value). A mistake is named by file and line, all of them at once,
before any framework is imported.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_fish.dataset_info import Columns, find_entry
from mlx_fish.errors import FishError, did_you_mean
from mlx_fish.files import is_path

SPLITS = ("train", "valid", "test")
DEFAULT_DATA = "fish_care"
MAX_LINE_BYTES = 4 << 20
MAX_ARRAY_BYTES = 256 << 20  # a .json file is parsed whole
MAX_REPORTED = 20
_LONGEST_MISTAKE = 600
BUILT_IN = Path(__file__).parent / "data_sets"

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_SHAPES = {
    "question/answer": ("question", "answer"),
    "instruction/input/output": ("instruction", "output"),
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
}


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. `input` is a user turn's further material, kept apart since templates differ on it."""

    role: str
    content: str
    input: str = ""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an answer. `where` is `file:line`."""

    turns: tuple[Turn, ...]
    where: str


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


@dataclass(frozen=True)
class Dataset:
    """What `--data` named: its examples by split, a sha256 of each file read, and the broken rows that were left out."""

    name: str
    splits: dict[str, list[Example]]
    hashes: dict[str, str] = field(default_factory=dict)
    skipped: Mistakes = field(default_factory=Mistakes)


class RowError(Exception):
    """What is wrong with one row, without its place."""


def load_dataset(data: str | None = None, *, skip_bad_rows: bool = False) -> Dataset:
    """Read `--data`: a .jsonl or .json file, a folder of train/valid/test files, or a name in dataset_info.json.

    A single file is split by content (`split_of`); a folder's own files are taken as they are.

    Args:
        skip_bad_rows: leave broken rows out (`Dataset.skipped` counts them) instead of refusing the data set.

    Raises:
        FishError: nothing there, or broken rows: up to twenty of them, each with file, line and what was expected.
    """
    name = data or DEFAULT_DATA
    path = Path(name)
    columns = None
    mistakes = Mistakes()
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    if not is_path(name):
        raise FishError(f"--data {name[:40]!r}: a file, a folder or a data set's name was expected.")
    if path.is_dir():
        hashes = _load_folder(path, splits, mistakes)
    else:
        if not path.is_file():
            path, columns = find_entry(name, [Path("data"), *_built_in_folders()])
        examples, digest = _read(path, columns, mistakes)
        hashes = {path.name: digest}
        for example in examples:
            splits[split_of(example)].append(example)
    if not skip_bad_rows:
        mistakes.refuse()
    if not any(splits.values()):
        raise FishError(
            f"{path} holds no {'usable ' if mistakes.count else ''}rows; one JSON object a line was expected, "
            'such as {"question": "…", "answer": "…"}.'
        )
    return Dataset(name if not path.is_dir() else str(path), splits, hashes, mistakes)


def _built_in_folders() -> list[Path]:
    """The data that ships with the package: inside it when installed, beside it in a checkout."""
    return [BUILT_IN, Path(__file__).parent.parent / "data"]


def _load_folder(folder: Path, splits: dict[str, list[Example]], mistakes: Mistakes) -> dict[str, str]:
    """Fill the splits from the folder's files; returns the files' sha256."""
    hashes = {}
    for split in SPLITS:
        for path in (folder / f"{split}.jsonl", folder / f"{split}.json"):
            if path.is_file():
                splits[split], hashes[path.name] = _read(path, None, mistakes)
    if not any(name.startswith(("train.", "test.")) for name in hashes):
        raise FishError(
            f"{folder} has no train.jsonl; name a file, or put train.jsonl (and valid, test) into the folder."
        )
    return hashes


def split_of(example: Example) -> str:
    """`train` (80 %), `valid` (10 %) or `test` (10 %), by a hash of the row's content.

    Not by its position: adding, removing or sorting rows never moves another row across, and equal rows stay together.
    """
    content = "\x1f".join(f"{turn.role}\x1e{turn.content}\x1e{turn.input}" for turn in example.turns)
    digest = hashlib.sha256(unicodedata.normalize("NFC", content).encode()).digest()
    place = int.from_bytes(digest[:8], "big") % 100
    return "train" if place < 80 else "valid" if place < 90 else "test"


def read_file(path: Path, columns: Columns | None = None) -> tuple[list[Example], str]:
    """All examples of one file, and the file's sha256.

    Args:
        columns: how a dataset_info.json entry names its columns; None: recognise the shape row by row.

    Raises:
        FishError: broken rows, told together.
    """
    mistakes = Mistakes()
    examples, digest = _read(path, columns, mistakes)
    mistakes.refuse()
    return examples, digest


def _read(path: Path, columns: Columns | None, mistakes: Mistakes) -> tuple[list[Example], str]:
    """The good rows of one file and its sha256; the broken ones go to `mistakes`."""
    digest = hashlib.sha256()
    examples: list[Example] = []
    for where, row in _rows(path, digest):
        try:
            if isinstance(row, RowError):
                raise row
            examples.append(Example(_parse(row, columns), where))
        except RowError as error:
            mistakes.add(f"{where}: {error}")
    return examples, digest.hexdigest()


def _rows(path: Path, digest: Any) -> Iterator[tuple[str, Any]]:
    """(file:line, the parsed row or the RowError it is). A .json file holds one array; its rows are counted from 1."""
    try:
        if path.suffix == ".json":
            if path.stat().st_size > MAX_ARRAY_BYTES:
                raise FishError(f"{path} is larger than {MAX_ARRAY_BYTES >> 20} MB; write one object a line (.jsonl).")
            content = path.read_bytes()
            digest.update(content)
            rows = _parse_json(content)
            if isinstance(rows, RowError):
                yield str(path), rows
            elif not isinstance(rows, list):
                yield (
                    str(path),
                    RowError("an array of objects was expected in a .json file (one object a line: name it .jsonl)"),
                )
            else:
                yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
            return
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                digest.update(line)
                where = f"{path}:{number}"
                if len(line) > MAX_LINE_BYTES:
                    yield (
                        where,
                        RowError(f"the line is longer than {MAX_LINE_BYTES >> 20} MB; one row a line was expected"),
                    )
                    while line and not line.endswith(b"\n"):  # to the line's end, without ever holding it
                        line = file.readline(MAX_LINE_BYTES)
                        digest.update(line)
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield where, _parse_json(line)
    except OSError as error:
        raise FishError(f"cannot read {path}: {error.strerror or error}.") from error


def _parse_json(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return RowError(f"not valid JSON: {error.msg} at column {error.colno}")
    except ValueError:  # Python's limit on the digits of a whole number
        return RowError("a number of thousands of digits; text was expected")
    except RecursionError:
        return RowError("nested too deeply")
    except RowError as error:
        return error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(f"the key `{next(key for key in keys if keys.count(key) > 1)}` stands twice")
    return row


def _no_constant(text: str) -> None:
    raise RowError(f"{text} is not JSON")


def _parse(row: Any, columns: Columns | None) -> tuple[Turn, ...]:
    if not isinstance(row, dict):
        raise RowError(f"a JSON object was expected, not {_kind(row)}")
    columns = columns or _recognise(row)
    turns = _from_messages(row, columns) if columns.messages else _from_pair(row, columns)
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError("no assistant turn; there is nothing to learn from")
    if turns[-1].role != "assistant":
        raise RowError("the last turn is not the assistant's; an answer was expected")
    before = ""
    for turn in turns:
        if turn.role == "system" and turn is not turns[0]:
            raise RowError("a system turn after the start; it was expected first")
        if turn.role == "assistant" and before != "user":
            raise RowError("an assistant turn that follows no user turn")
        if turn.role == before:
            raise RowError(f"two {turn.role} turns in a row; they were expected to alternate")
        before = turn.role
    return tuple(turns)


def _recognise(row: dict[str, Any]) -> Columns:
    shapes = [shape for shape, needed in _SHAPES.items() if all(key in row for key in needed)]
    if not shapes:
        known = sorted({key for needed in _SHAPES.values() for key in needed})
        for needed in _SHAPES.values():
            missing = [key for key in needed if key not in row]
            if len(missing) < len(needed):
                near = [key for key in row if key not in needed and did_you_mean(key, missing)]
                hint = f" (is `{near[0]}` meant?)" if near else ""
                raise RowError(f"`{missing[0]}` is missing beside `{'`, `'.join(k for k in needed if k in row)}`{hint}")
        for key in row:
            if hint := did_you_mean(key, known):
                raise RowError(f"unknown field `{key}`.{hint}")
        raise RowError(f"fields {', '.join(row) or '(none)'}; expected one of: {'; '.join(_SHAPES)}")
    shape = shapes[0]
    if shape == "question/answer":
        return Columns(prompt="question", query="input", response="answer", system="system")
    if shape == "instruction/input/output":
        return Columns(prompt="instruction", query="input", response="output", system="system", history="history")
    if shape == "prompt/completion":
        return Columns(prompt="prompt", response="completion", system="system")
    if shape == "messages":
        return Columns(messages="messages", role_tag="role", content_tag="content", system="system")
    return Columns(messages="conversations", role_tag="from", content_tag="value", system="system")


def _from_pair(row: dict[str, Any], columns: Columns) -> list[Turn]:
    turns = []
    if columns.system and row.get(columns.system):
        turns.append(Turn("system", _text(row, columns.system)))
    for pair in _history(row, columns):
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    further = _text(row, columns.query, empty=True) if columns.query and row.get(columns.query) is not None else ""
    turns.append(Turn("user", _text(row, columns.prompt), further.strip()))
    turns.append(Turn("assistant", _text(row, columns.response)))
    return turns


def _history(row: dict[str, Any], columns: Columns) -> list[list[str]]:
    history = row.get(columns.history) if columns.history else None
    if history is None:
        return []
    valid = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
        for pair in history
    )
    if not valid:
        raise RowError(f"`{columns.history}` should be a list of [question, answer] pairs")
    for pair in history:
        for text in pair:
            _check_text(text, columns.history)
    return list(history)


def _from_messages(row: dict[str, Any], columns: Columns) -> list[Turn]:
    messages = row.get(columns.messages)
    if not isinstance(messages, list) or not messages:
        raise RowError(f"`{columns.messages}` should be a list of turns, not {_kind(messages)}")
    roles = columns.roles or _ROLES
    turns = []
    if columns.system and row.get(columns.system):
        turns.append(Turn("system", _text(row, columns.system)))
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise RowError(f"turn {number} is {_kind(message)}; an object was expected")
        role = message.get(columns.role_tag)
        if not isinstance(role, str) or role not in roles:
            hint = did_you_mean(role, roles) if isinstance(role, str) else ""
            raise RowError(
                f"turn {number} has the unknown {columns.role_tag} {role!r}; expected {', '.join(roles)}.{hint}"
            )
        try:
            turns.append(Turn(roles[role], _text(message, columns.content_tag)))
        except RowError as error:
            raise RowError(f"turn {number}: {error}") from None
    return turns


def _text(row: dict[str, Any], key: str, *, empty: bool = False) -> str:
    if key not in row:
        near = [name for name in row if did_you_mean(name, [key])]
        raise RowError(f"`{key}` is missing" + (f" (is `{near[0]}` meant?)" if near else ""))
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f"`{key}` should be text, not {_kind(value)}")
    if not empty and not value.strip():
        raise RowError(f"`{key}` is empty")
    _check_text(value, key)
    return value


def _check_text(value: str, key: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"`{key}` holds half of a surrogate pair, which is no character") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")
