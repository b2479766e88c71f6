"""Read LLaMA-Factory's dataset_info.json, which maps the name of a data set to its file and column names.

Schema: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md. Unsupported settings raise an error
that names them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_fish.errors import FishError, did_you_mean
from mlx_fish.storage.files import is_path, read_json

FILE_NAME = "dataset_info.json"
_KNOWN_KEYS = {"file_name", "formatting", "columns", "tags", "sample_questions", "warning"}
_COLUMN_KEYS = {
    "alpaca": {"prompt", "query", "response", "system", "history"},
    "sharegpt": {"messages", "system"},
    "openai": {"messages", "system"},
}


@dataclass(frozen=True)
class Columns:
    """The column names of a data set. An empty name means that the data set has no such column.

    If `messages` is set, that column contains a list of turns, each with the keys `role_tag` and
    `content_tag`. Otherwise a row has one `prompt` and one `response`.

    Attributes:
        roles: the data set's role names -> system, user or assistant. Empty: the usual names.
    """

    prompt: str = ""
    query: str = ""
    response: str = ""
    system: str = ""
    history: str = ""
    messages: str = ""
    role_tag: str = ""
    content_tag: str = ""
    roles: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One data set in a dataset_info.json.

    Attributes:
        path: the data file.
        info: the dataset_info.json itself.
        sample_questions: questions answered before and after training. An mlx-fish key, which LLaMA-Factory
            ignores.
        warning: language (`en`, `zh`) -> warning in the model card of a model tuned on this data set. Also an
            mlx-fish key.
    """

    path: Path
    info: Path
    columns: Columns
    sample_questions: tuple[str, ...] = ()
    warning: dict[str, str] = field(default_factory=dict)


def find_entry(name: str, folders: list[Path], *, required: tuple[str, ...]) -> Entry:
    """Look up a data set by name in the dataset_info.json of each folder; the first match is returned.

    Args:
        required: the columns that an entry with alpaca formatting must name.

    Raises:
        FishError: the name is unknown (a similar one is suggested), or its entry is invalid or uses an
            unsupported setting.
    """
    known_names: list[str] = []
    for folder in folders:
        info_path = folder / FILE_NAME
        if not info_path.is_file():
            continue
        info = read_json(info_path)
        if name in info:
            return _read_entry(folder, name, info[name], required)
        known_names += info
    hint = did_you_mean(name, known_names)
    context = (
        f"known data sets: {', '.join(dict.fromkeys(known_names))}"
        if known_names
        else f"no {FILE_NAME} was found either"
    )
    raise FishError(f"--data {name}: there is no such file or folder ({context}).{hint}")


def _read_entry(folder: Path, name: str, entry: Any, required: tuple[str, ...]) -> Entry:
    where = f"{folder / FILE_NAME}: `{name}`"
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise FishError(f"{where} has no `file_name`; only data sets in local files are supported.")
    unsupported = [key for key in entry if key not in _KNOWN_KEYS and entry[key]]
    if unsupported:
        raise FishError(
            f"{where} sets {', '.join(unsupported)}, which mlx-fish does not support; "
            "remove it or pass the file itself."
        )
    if not is_path(entry["file_name"]):
        raise FishError(f"{where} has a `file_name` that is not a valid path.")
    path = folder / entry["file_name"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise FishError(f"{where} names a file outside its folder ({entry['file_name']}).")
    if not path.is_file():
        raise FishError(f"{where} names {path}, which does not exist.")
    questions, warning = entry.get("sample_questions") or [], entry.get("warning") or {}
    if not isinstance(questions, list) or not all(isinstance(text, str) and text.strip() for text in questions):
        raise FishError(f"{where}: `sample_questions` should be a list of questions.")
    if not isinstance(warning, dict) or not all(isinstance(text, str) for text in (*warning, *warning.values())):
        raise FishError(f'{where}: `warning` should be an object such as {{"en": "…", "zh": "…"}}.')
    return Entry(path, folder / FILE_NAME, _read_columns(where, entry, required), tuple(questions), warning)


def _read_columns(where: str, entry: dict[str, Any], required: tuple[str, ...]) -> Columns:
    """Return the column names of an entry, with LLaMA-Factory's defaults.

    Args:
        where: location of the entry, for error messages.
    """
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _COLUMN_KEYS:
        raise FishError(f"{where} has formatting {formatting!r}; expected alpaca, sharegpt or openai.")
    names = entry.get("columns") or {}
    for key in names:
        if key not in _COLUMN_KEYS[formatting]:
            hint = did_you_mean(key, _COLUMN_KEYS[formatting])
            raise FishError(f"{where} has a column `{key}`, which mlx-fish does not support with {formatting}.{hint}")
    if formatting == "alpaca":
        names = names or {"prompt": "instruction", "query": "input", "response": "output"}
        if any(column not in names for column in required):
            raise FishError(f"{where} needs the columns {' and '.join(f'`{column}`' for column in required)}.")
        return Columns(**names)
    tags = entry.get("tags") or {}
    is_openai = formatting == "openai"
    roles = {
        tags.get("user_tag", "user" if is_openai else "human"): "user",
        tags.get("assistant_tag", "assistant" if is_openai else "gpt"): "assistant",
        tags.get("system_tag", "system"): "system",
    }
    return Columns(
        messages=names.get("messages", "messages" if is_openai else "conversations"),
        system=names.get("system", ""),
        role_tag=tags.get("role_tag", "role" if is_openai else "from"),
        content_tag=tags.get("content_tag", "content" if is_openai else "value"),
        roles=roles,
    )
