"""LLaMA-Factory's dataset_info.json: a data set's name -> its file and what its columns are called.

The schema: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md. What cannot be honoured is refused by name.
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
    """What each part of a row is called; an empty name means that the data set has no such column.

    `messages` set: a list of turns, each with `role_tag` and `content_tag`; else one `prompt` and one `response`.
    `roles` maps the data set's role names to system, user and assistant (empty: the usual names).
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
    """One data set of a dataset_info.json.

    Attributes:
        path: its file.
        info: the dataset_info.json itself.
        sample_questions: what training asks before and after; a key of ours, which LLaMA-Factory ignores.
        warning: what the card of a model tuned on it says about its advice, by language (`en`, `zh`); ours too.
    """

    path: Path
    info: Path
    columns: Columns
    sample_questions: tuple[str, ...] = ()
    warning: dict[str, str] = field(default_factory=dict)


def find_entry(name: str, folders: list[Path], *, required: tuple[str, ...]) -> Entry:
    """Look a data set's name up in each folder's dataset_info.json.

    Args:
        required: the columns that an entry in the alpaca formatting must name.

    Raises:
        FishError: no such name (the nearest is suggested), or an entry that asks for what is not supported.
    """
    known: list[str] = []
    for folder in folders:
        info_path = folder / FILE_NAME
        if not info_path.is_file():
            continue
        info = read_json(info_path)
        if name in info:
            return _read_entry(folder, name, info[name], required)
        known += info
    hint = did_you_mean(name, known)
    looked = (
        f"data sets known by name: {', '.join(dict.fromkeys(known))}" if known else f"no {FILE_NAME} was found either"
    )
    raise FishError(f"--data {name}: there is no such file or folder ({looked}).{hint}")


def _read_entry(folder: Path, name: str, entry: Any, required: tuple[str, ...]) -> Entry:
    place = f"{folder / FILE_NAME}: `{name}`"
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise FishError(f"{place} has no `file_name`; only data sets in local files are read.")
    unknown = [key for key in entry if key not in _KNOWN_KEYS and entry[key]]
    if unknown:
        raise FishError(
            f"{place} asks for {', '.join(unknown)}, which mlx-fish does not support; remove it or give the file itself."
        )
    if not is_path(entry["file_name"]):
        raise FishError(f"{place} has a `file_name` that no file can have.")
    path = folder / entry["file_name"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise FishError(f"{place} names a file outside its folder ({entry['file_name']}).")
    if not path.is_file():
        raise FishError(f"{place} names {path}, which does not exist.")
    questions, warning = entry.get("sample_questions") or [], entry.get("warning") or {}
    if not isinstance(questions, list) or not all(isinstance(text, str) and text.strip() for text in questions):
        raise FishError(f"{place}: `sample_questions` should be a list of questions.")
    if not isinstance(warning, dict) or not all(isinstance(text, str) for text in (*warning, *warning.values())):
        raise FishError(f'{place}: `warning` should be an object such as {{"en": "…", "zh": "…"}}.')
    return Entry(path, folder / FILE_NAME, _columns(place, entry, required), tuple(questions), warning)


def _columns(place: str, entry: dict[str, Any], required: tuple[str, ...]) -> Columns:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _COLUMN_KEYS:
        raise FishError(f"{place} has formatting {formatting!r}; expected alpaca, sharegpt or openai.")
    names = entry.get("columns") or {}
    for key in names:
        if key not in _COLUMN_KEYS[formatting]:
            hint = did_you_mean(key, _COLUMN_KEYS[formatting])
            raise FishError(f"{place} has a column `{key}`, which mlx-fish does not support with {formatting}.{hint}")
    if formatting == "alpaca":
        names = names or {"prompt": "instruction", "query": "input", "response": "output"}
        if any(column not in names for column in required):
            raise FishError(f"{place} needs the columns {' and '.join(f'`{column}`' for column in required)}.")
        return Columns(**names)
    tags = entry.get("tags") or {}
    openai = formatting == "openai"
    roles = {
        tags.get("user_tag", "user" if openai else "human"): "user",
        tags.get("assistant_tag", "assistant" if openai else "gpt"): "assistant",
        tags.get("system_tag", "system"): "system",
    }
    return Columns(
        messages=names.get("messages", "messages" if openai else "conversations"),
        system=names.get("system", ""),
        role_tag=tags.get("role_tag", "role" if openai else "from"),
        content_tag=tags.get("content_tag", "content" if openai else "value"),
        roles=roles,
    )
