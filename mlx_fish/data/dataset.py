"""Load a data set: read files into examples and split them into train, valid and test.

Independent of tokenizers and templates. Supported row formats: `question/answer(/input)`,
`instruction/input/output` (with `system` and `history`), `prompt/completion`, `messages` (role/content),
`conversations` (from/value), and `text` for documents. All invalid rows are reported together, with file and
line, before any framework is imported.
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
MAX_ARRAY_BYTES = 256 << 20  # a .json or .txt file is read into memory at once
_BOM = b"\xef\xbb\xbf"
BUILT_IN = Path(__file__).parent / "sets"


@dataclass(frozen=True)
class Dataset:
    """A loaded data set.

    Attributes:
        name: the argument of `--data`, or the folder's path.
        splits: split name -> examples.
        hashes: file name -> sha256 of each file read.
        skipped: the invalid rows that were skipped.
        path: its file, its folder, or the dataset_info.json that defines its name; None for a built-in data
            set.
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
    """Load a data set from a .jsonl, .json or .txt file, a folder, or a name in dataset_info.json.

    A single file and a folder of .txt files are split by content (`split_of`). The train, valid and test
    files of a folder are used without further splitting.

    Args:
        data: the argument of `--data`; None: `DEFAULT_DATA`.
        kind: conversations or documents.
        skip_bad_rows: skip invalid rows and collect them in `Dataset.skipped`, instead of raising an error.
        found_at: `Dataset.path` from an earlier load. It is tried first, because a run may be resumed from
            another working directory.

    Raises:
        FishError: the data set does not exist, is empty, or has invalid rows. The message lists up to twenty
            rows, each with file, line and what was expected.
    """
    name = data or DEFAULT_DATA
    if found_at is not None and found_at.exists() and found_at.name != INFO_FILE:
        path = found_at
    elif is_path(name):
        path = Path(name)
    else:
        raise FishError(f"--data {name[:40]!r}: a file, a folder or the name of a data set was expected.")
    mistakes = Mistakes()
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    entry = None
    if path.is_dir():
        hashes = _load_folder(path, splits, mistakes, kind)
    else:
        if not path.is_file():
            recorded_folders = [found_at.parent] if found_at is not None and found_at.name == INFO_FILE else []
            entry = find_entry(name, [*recorded_folders, Path("data"), *_built_in_folders()], required=kind.required)
            path = entry.path
        hashes = _load_file(path, entry.columns if entry else None, splits, mistakes, kind)
    if not skip_bad_rows:
        mistakes.refuse()
    if not any(splits.values()):
        raise FishError(
            f"{path} contains no {'usable ' if mistakes.count else ''}rows; one JSON object per line was expected, "
            'such as {"question": "…", "answer": "…"}.'
        )
    return Dataset(
        name if not path.is_dir() else str(path),
        splits,
        hashes,
        mistakes,
        path=_recorded_path(entry.info if entry else path),
        sample_questions=entry.sample_questions if entry else (),
        warning=entry.warning if entry else {},
    )


def _recorded_path(path: Path) -> Path | None:
    """Return the absolute path, or None for built-in data, whose location differs between installations."""
    path = path.resolve()
    return None if path.parent in [folder.resolve() for folder in _built_in_folders()] else path


def _built_in_folders() -> list[Path]:
    """Return the folders with built-in data: inside an installed package, or next to it in a checkout."""
    return [BUILT_IN, Path(__file__).parents[2] / "data"]


def _load_folder(folder: Path, splits: dict[str, list[Example]], mistakes: Mistakes, kind: RowKind) -> dict[str, str]:
    """Add the examples of a folder to `splits`, and return file name -> sha256."""
    hashes = {}
    for split in SPLITS:
        for path in (folder / f"{split}.jsonl", folder / f"{split}.json"):
            if path.is_file():
                splits[split], hashes[path.name] = _read_examples(path, None, mistakes, kind)
    if not hashes:
        for path in sorted(folder.glob("*.txt")):
            hashes |= _load_file(path, None, splits, mistakes, kind)
    if not any(name.startswith(("train.", "test.")) or name.endswith(".txt") for name in hashes):
        raise FishError(
            f"{folder} has no train.jsonl; pass a file, or put train.jsonl (optionally valid and test) into the folder."
        )
    return hashes


def _load_file(
    path: Path, columns: Columns | None, splits: dict[str, list[Example]], mistakes: Mistakes, kind: RowKind
) -> dict[str, str]:
    """Add the examples of one file to `splits`, split by content, and return file name -> sha256."""
    examples, digest = _read_examples(path, columns, mistakes, kind)
    for example in examples:
        splits[split_of(example)].append(example)
    return {path.name: digest}


def split_of(example: Example) -> str:
    """Assign an example to `train` (80 %), `valid` (10 %) or `test` (10 %) by a hash of its content.

    The split does not depend on the row's position: adding, removing or sorting rows never moves another row
    to a different split, and identical rows are always in the same split.
    """
    content = "\x1f".join(f"{turn.role}\x1e{turn.content}\x1e{turn.input}" for turn in example.turns)
    digest = hashlib.sha256(unicodedata.normalize("NFC", content).encode()).digest()
    percentile = int.from_bytes(digest[:8], "big") % 100
    return "train" if percentile < 80 else "valid" if percentile < 90 else "test"


def _read_examples(path: Path, columns: Columns | None, mistakes: Mistakes, kind: RowKind) -> tuple[list[Example], str]:
    """Return the valid examples of one file and its sha256, and add the errors of invalid rows to `mistakes`."""
    digest = hashlib.sha256()
    examples: list[Example] = []
    for where, row in _read_rows(path, digest):
        try:
            if isinstance(row, RowError):
                raise row
            examples.append(Example(kind.parse(row, columns), where))
        except RowError as error:
            mistakes.add(f"{where}: {error}")
    return examples, digest.hexdigest()


def _read_rows(path: Path, digest: Any) -> Iterator[tuple[str, Any]]:
    """Yield (location, parsed row or RowError) for each row of a file, and update `digest` with the bytes read.

    A .jsonl file has one row per line. A .json file is one array, whose rows are numbered from 1. A .txt file
    is a single row with its text.
    """
    try:
        if path.suffix == ".txt":
            content = _read_bytes(path)
            digest.update(content)
            text = decode_text(content.removeprefix(_BOM))
            yield str(path), text if isinstance(text, RowError) else {"text": text}
            return
        if path.suffix == ".json":
            content = _read_bytes(path)
            digest.update(content)
            rows = parse_json(content.removeprefix(_BOM))
            if isinstance(rows, RowError):
                yield str(path), rows
            elif not isinstance(rows, list):
                yield (
                    str(path),
                    RowError("an array of objects was expected in a .json file (use .jsonl for one object per line)"),
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
                        RowError(f"the line is longer than {MAX_LINE_BYTES >> 20} MB; one row per line was expected"),
                    )
                    while line and not line.endswith(b"\n"):  # skip to the end of the line without holding all of it
                        line = file.readline(MAX_LINE_BYTES)
                        digest.update(line)
                    continue
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield where, parse_json(line)
    except OSError as error:
        raise FishError(f"cannot read {path}: {error.strerror or error}.") from error


def _read_bytes(path: Path) -> bytes:
    """Return the content of a file of at most `MAX_ARRAY_BYTES`."""
    if path.stat().st_size > MAX_ARRAY_BYTES:
        raise FishError(
            f"{path} is larger than {MAX_ARRAY_BYTES >> 20} MB; use a .jsonl file with one object per line."
        )
    return path.read_bytes()
