"""Files -> Examples, each with its file and line. Knows nothing of tokens or templates.

Row shapes read: `question/answer(/input)`, `instruction/input/output` (with `system` and `history`), `prompt/completion`,
`messages` (role/content) and `conversations` (from/value). A mistake is named by file and line, all of them at once,
before any framework is imported.
"""

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_fish.data.examples import Example, Mistakes, RowError
from mlx_fish.data.formats.dataset_info import Columns, find_entry
from mlx_fish.data.formats.rows import parse_conversation, parse_json
from mlx_fish.errors import FishError
from mlx_fish.storage.files import is_path

SPLITS = ("train", "valid", "test")
DEFAULT_DATA = "fish_care"
MAX_LINE_BYTES = 4 << 20
MAX_ARRAY_BYTES = 256 << 20  # a .json file is parsed whole
BUILT_IN = Path(__file__).parent / "sets"


@dataclass(frozen=True)
class Dataset:
    """What `--data` named: its examples by split, a sha256 of each file read, and the broken rows that were left out."""

    name: str
    splits: dict[str, list[Example]]
    hashes: dict[str, str] = field(default_factory=dict)
    skipped: Mistakes = field(default_factory=Mistakes)


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
    return [BUILT_IN, Path(__file__).parents[2] / "data"]


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
            examples.append(Example(parse_conversation(row, columns), where))
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
            rows = parse_json(content)
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
                    yield where, parse_json(line)
    except OSError as error:
        raise FishError(f"cannot read {path}: {error.strerror or error}.") from error
