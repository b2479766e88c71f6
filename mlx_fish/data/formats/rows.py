"""One row of a data set -> the turns of a conversation, or what is wrong with it. Knows nothing of files."""

import json
from typing import Any

from mlx_fish.data.examples import RowError, RowKind, Turn
from mlx_fish.data.formats.dataset_info import Columns
from mlx_fish.errors import did_you_mean

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


def decode_text(content: bytes) -> Any:
    """The text of a file, or the RowError that it is."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8")


def parse_json(content: bytes) -> Any:
    """The value of a line or a file, or the RowError that it is."""
    text = decode_text(content)
    if isinstance(text, RowError):
        return text
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
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


def parse_conversation(row: Any, columns: Columns | None) -> tuple[Turn, ...]:
    """The turns of a conversation: a user's, an assistant's, in turn, after a system turn or none."""
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


def parse_document(row: Any, columns: Columns | None) -> tuple[Turn, ...]:
    """One turn, the text of the column `text`."""
    if not isinstance(row, dict):
        raise RowError(f"a JSON object was expected, not {_kind(row)}")
    key = columns.prompt if columns and columns.prompt else "text"
    if key not in row and any(all(name in row for name in shape) for shape in _SHAPES.values()):
        raise RowError(f"`{key}` is missing: this is a row of questions and answers, which --stage sft trains on")
    return (Turn("document", _text(row, key)),)


CONVERSATIONS = RowKind(parse_conversation, required=("prompt", "response"))
DOCUMENTS = RowKind(parse_document, required=("prompt",))


def _recognise(row: dict[str, Any]) -> Columns:
    shapes = [shape for shape, needed in _SHAPES.items() if all(key in row for key in needed)]
    if not shapes and set(row) == {"text"}:
        raise RowError("`text` alone is a document, without a question and an answer; --stage pt trains on documents")
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
