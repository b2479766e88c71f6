"""Files -> Examples, each with its file and line. Knows nothing of tokens or templates.

Row shapes read: `question/answer(/input)`, `instruction/input/output` (with `system` and `history`), `prompt/completion`,
`messages` (role/content), `conversations` (from/value), and for documents `text`. A mistake is named by file and line, all of them at once,
before any framework is imported.
"""

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_fish.data.examples import Example, Mistakes, RowError, RowKind
from mlx_fish.data.formats.dataset_info import FILE_NAME as INFO_FILE
from mlx_fish.data.formats.dataset_info import Columns, find_entry
from mlx_fish.data.formats.rows import CONVERSATIONS, decode_text, parse_json
from mlx_fish.errors import FishError
from mlx_fish.storage.files import is_path

SPLITS = ("train", "valid", "test")
DEFAULT_DATA = "fish_care"
MAX_LINE_BYTES = 4 << 20
MAX_ARRAY_BYTES = 256 << 20  # a .json file is parsed whole
_BOM = b"\xef\xbb\xbf"
BUILT_IN = Path(__file__).parent / "sets"


@dataclass(frozen=True)
class Dataset:
    """What `--data` named.

    Attributes:
        splits: its examples by split.
        hashes: file name -> sha256 of each file read.
        skipped: the broken rows that were left out.
        path: where it was found: its file, its folder, or the dataset_info.json that knows its name; None for a built-in one.
        sample_questions, warning: see `dataset_info.Entry`.
    """

    name: str
    splits: dict[str, list[Example]]
    hashes: dict[str, str] = field(default_factory=dict)
    skipped: Mistakes = field(default_factory=Mistakes)
    path: Path | None = None
    sample_questions: tuple[str, ...] = ()
    warning: dict[str, str] = field(default_factory=dict)


def load_dataset(
    data: str | None = None,
    *,
    kind: RowKind = CONVERSATIONS,
    skip_bad_rows: bool = False,
    found_at: Path | None = None,
) -> Dataset:
    """Read `--data`: a .jsonl, .json or .txt file, a folder, or a name in dataset_info.json.

    A single file is split by content (`split_of`), and so is a folder of .txt files; a folder's train, valid and test files are
    taken as they are.

    Args:
        kind: what its rows are.
        skip_bad_rows: leave broken rows out (`Dataset.skipped` counts them) instead of refusing the data set.
        found_at: `Dataset.path` of an earlier reading, which is looked at first: a run may go on from another folder.

    Raises:
        FishError: nothing there, or broken rows: up to twenty of them, each with file, line and what was expected.
    """
    name = data or DEFAULT_DATA
    if found_at is not None and found_at.exists() and found_at.name != INFO_FILE:
        path = found_at
    elif is_path(name):
        path = Path(name)
    else:
        raise FishError(f"--data {name[:40]!r}: a file, a folder or a data set's name was expected.")
    mistakes = Mistakes()
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    entry = None
    if path.is_dir():
        hashes = _load_folder(path, splits, mistakes, kind)
    else:
        if not path.is_file():
            known = [found_at.parent] if found_at is not None and found_at.name == INFO_FILE else []
            entry = find_entry(name, [*known, Path("data"), *_built_in_folders()], required=kind.required)
            path = entry.path
        hashes = _split_file(path, entry.columns if entry else None, splits, mistakes, kind)
    if not skip_bad_rows:
        mistakes.refuse()
    if not any(splits.values()):
        raise FishError(
            f"{path} holds no {'usable ' if mistakes.count else ''}rows; one JSON object a line was expected, "
            'such as {"question": "…", "answer": "…"}.'
        )
    return Dataset(
        name if not path.is_dir() else str(path),
        splits,
        hashes,
        mistakes,
        path=_absolute(entry.info if entry else path),
        sample_questions=entry.sample_questions if entry else (),
        warning=entry.warning if entry else {},
    )


def _absolute(path: Path) -> Path | None:
    """None for what ships with the package, which another installation has in another place."""
    path = path.resolve()
    return None if path.parent in [folder.resolve() for folder in _built_in_folders()] else path


def _built_in_folders() -> list[Path]:
    """The data that ships with the package: inside it when installed, beside it in a checkout."""
    return [BUILT_IN, Path(__file__).parents[2] / "data"]


def _load_folder(folder: Path, splits: dict[str, list[Example]], mistakes: Mistakes, kind: RowKind) -> dict[str, str]:
    """Fill the splits from the folder's files; returns the files' sha256."""
    hashes = {}
    for split in SPLITS:
        for path in (folder / f"{split}.jsonl", folder / f"{split}.json"):
            if path.is_file():
                splits[split], hashes[path.name] = _read(path, None, mistakes, kind)
    if not hashes:
        for path in sorted(folder.glob("*.txt")):
            hashes |= _split_file(path, None, splits, mistakes, kind)
    if not any(name.startswith(("train.", "test.")) or name.endswith(".txt") for name in hashes):
        raise FishError(
            f"{folder} has no train.jsonl; name a file, or put train.jsonl (and valid, test) into the folder."
        )
    return hashes


def _split_file(
    path: Path, columns: Columns | None, splits: dict[str, list[Example]], mistakes: Mistakes, kind: RowKind
) -> dict[str, str]:
    """Fill the splits from one file, by content; returns its sha256 by its name."""
    examples, digest = _read(path, columns, mistakes, kind)
    for example in examples:
        splits[split_of(example)].append(example)
    return {path.name: digest}


def split_of(example: Example) -> str:
    """`train` (80 %), `valid` (10 %) or `test` (10 %), by a hash of the row's content.

    Not by its position: adding, removing or sorting rows never moves another row across, and equal rows stay together.
    """
    content = "\x1f".join(f"{turn.role}\x1e{turn.content}\x1e{turn.input}" for turn in example.turns)
    digest = hashlib.sha256(unicodedata.normalize("NFC", content).encode()).digest()
    place = int.from_bytes(digest[:8], "big") % 100
    return "train" if place < 80 else "valid" if place < 90 else "test"


def _read(path: Path, columns: Columns | None, mistakes: Mistakes, kind: RowKind) -> tuple[list[Example], str]:
    """The good rows of one file and its sha256; the broken ones go to `mistakes`."""
    digest = hashlib.sha256()
    examples: list[Example] = []
    for where, row in _rows(path, digest):
        try:
            if isinstance(row, RowError):
                raise row
            examples.append(Example(kind.parse(row, columns), where))
        except RowError as error:
            mistakes.add(f"{where}: {error}")
    return examples, digest.hexdigest()


def _rows(path: Path, digest: Any) -> Iterator[tuple[str, Any]]:
    """(file:line, the parsed row or the RowError it is). A .json file holds one array; its rows are counted from 1. A .txt file is
    one row, its text."""
    try:
        if path.suffix == ".txt":
            content = _whole(path)
            digest.update(content)
            text = decode_text(content.removeprefix(_BOM))
            yield str(path), text if isinstance(text, RowError) else {"text": text}
            return
        if path.suffix == ".json":
            content = _whole(path)
            digest.update(content)
            rows = parse_json(content.removeprefix(_BOM))
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
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield where, parse_json(line)
    except OSError as error:
        raise FishError(f"cannot read {path}: {error.strerror or error}.") from error


def _whole(path: Path) -> bytes:
    """A file that is parsed whole."""
    if path.stat().st_size > MAX_ARRAY_BYTES:
        raise FishError(f"{path} is larger than {MAX_ARRAY_BYTES >> 20} MB; write one object a line (.jsonl).")
    return path.read_bytes()
