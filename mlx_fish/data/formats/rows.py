"""Parse one row of a data set into turns, or describe what is wrong with it. Independent of files."""

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
# Format name -> the keys that identify it.
_FORMATS = {
    "question/answer": ("question", "answer"),
    "instruction/input/output": ("instruction", "output"),
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
}


def decode_text(content: bytes) -> Any:
    """Decode UTF-8 bytes; return the text, or a RowError if they are invalid."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8")


def parse_json(content: bytes) -> Any:
    """Parse the JSON of a line or a file; return the value, or a RowError if it is invalid."""
    text = decode_text(content)
    if isinstance(text, RowError):
        return text
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        return RowError(f"not valid JSON: {error.msg} at column {error.colno}")
    except ValueError:  # Python limits the number of digits of an integer
        return RowError("a number has thousands of digits; text was expected")
    except RecursionError:
        return RowError("nested too deeply")
    except RowError as error:
        return error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(f"the key `{next(key for key in keys if keys.count(key) > 1)}` appears twice")
    return row


def _reject_constant(text: str) -> None:
    raise RowError(f"{text} is not JSON")


def parse_conversation(row: Any, columns: Columns | None) -> tuple[Turn, ...]:
    """Parse a row into conversation turns: an optional system turn, then alternating user and assistant turns.

    Args:
        columns: the column names; None: inferred from the keys of the row.

    Raises:
        RowError: the row is not a valid conversation.
    """
    if not isinstance(row, dict):
        raise RowError(f"a JSON object was expected, not {_type_name(row)}")
    columns = columns or _infer_columns(row)
    turns = _message_turns(row, columns) if columns.messages else _pair_turns(row, columns)
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError("no assistant turn; there is nothing to learn from")
    if turns[-1].role != "assistant":
        raise RowError("the last turn is not the assistant's; an answer was expected")
    previous_role = ""
    for turn in turns:
        if turn.role == "system" and turn is not turns[0]:
            raise RowError("a system turn after the start; it was expected first")
        if turn.role == "assistant" and previous_role != "user":
            raise RowError("an assistant turn does not follow a user turn")
        if turn.role == previous_role:
            raise RowError(f"two {turn.role} turns in a row; they were expected to alternate")
        previous_role = turn.role
    return tuple(turns)


def parse_document(row: Any, columns: Columns | None) -> tuple[Turn, ...]:
    """Parse a row into a single document turn.

    Args:
        columns: the column names, where `prompt` is the document; None: the column `text`.

    Raises:
        RowError: the row has no valid document.
    """
    if not isinstance(row, dict):
        raise RowError(f"a JSON object was expected, not {_type_name(row)}")
    key = columns.prompt if columns and columns.prompt else "text"
    if key not in row and any(all(name in row for name in required) for required in _FORMATS.values()):
        raise RowError(f"`{key}` is missing: this is a question/answer row, which --stage sft trains on")
    return (Turn("document", _read_text(row, key)),)


CONVERSATIONS = RowKind(parse_conversation, required=("prompt", "response"))
DOCUMENTS = RowKind(parse_document, required=("prompt",))


def _infer_columns(row: dict[str, Any]) -> Columns:
    """Return the column names of the first format whose required keys the row has.

    Raises:
        RowError: no format matches. The message suggests a correction if possible.
    """
    formats = [name for name, required in _FORMATS.items() if all(key in row for key in required)]
    if not formats and set(row) == {"text"}:
        raise RowError("`text` alone is a document, without a question and an answer; --stage pt trains on documents")
    if not formats:
        known_keys = sorted({key for required in _FORMATS.values() for key in required})
        for required in _FORMATS.values():
            missing = [key for key in required if key not in row]
            if len(missing) < len(required):
                misspelled = [key for key in row if key not in required and did_you_mean(key, missing)]
                hint = f" (misspelled as `{misspelled[0]}`?)" if misspelled else ""
                raise RowError(
                    f"`{missing[0]}` is missing next to `{'`, `'.join(key for key in required if key in row)}`{hint}"
                )
        for key in row:
            if hint := did_you_mean(key, known_keys):
                raise RowError(f"unknown field `{key}`.{hint}")
        raise RowError(f"unsupported fields: {', '.join(row) or '(none)'}; expected one of: {'; '.join(_FORMATS)}")
    row_format = formats[0]
    if row_format == "question/answer":
        return Columns(prompt="question", query="input", response="answer", system="system")
    if row_format == "instruction/input/output":
        return Columns(prompt="instruction", query="input", response="output", system="system", history="history")
    if row_format == "prompt/completion":
        return Columns(prompt="prompt", response="completion", system="system")
    if row_format == "messages":
        return Columns(messages="messages", role_tag="role", content_tag="content", system="system")
    return Columns(messages="conversations", role_tag="from", content_tag="value", system="system")


def _pair_turns(row: dict[str, Any], columns: Columns) -> list[Turn]:
    """Return the turns of a row with a prompt and a response column."""
    turns = []
    if columns.system and row.get(columns.system):
        turns.append(Turn("system", _read_text(row, columns.system)))
    for pair in _read_history(row, columns):
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    query = _read_text(row, columns.query, empty=True) if columns.query and row.get(columns.query) is not None else ""
    turns.append(Turn("user", _read_text(row, columns.prompt), query.strip()))
    turns.append(Turn("assistant", _read_text(row, columns.response)))
    return turns


def _read_history(row: dict[str, Any], columns: Columns) -> list[list[str]]:
    history = row.get(columns.history) if columns.history else None
    if history is None:
        return []
    is_valid = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
        for pair in history
    )
    if not is_valid:
        raise RowError(f"`{columns.history}` should be a list of [question, answer] pairs")
    for pair in history:
        for text in pair:
            _check_text(text, columns.history)
    return list(history)


def _message_turns(row: dict[str, Any], columns: Columns) -> list[Turn]:
    """Return the turns of a row with a list of messages."""
    messages = row.get(columns.messages)
    if not isinstance(messages, list) or not messages:
        raise RowError(f"`{columns.messages}` should be a list of turns, not {_type_name(messages)}")
    roles = columns.roles or _ROLES
    turns = []
    if columns.system and row.get(columns.system):
        turns.append(Turn("system", _read_text(row, columns.system)))
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise RowError(f"turn {number} is {_type_name(message)}; an object was expected")
        role = message.get(columns.role_tag)
        if not isinstance(role, str) or role not in roles:
            hint = did_you_mean(role, roles) if isinstance(role, str) else ""
            raise RowError(
                f"turn {number} has the unknown {columns.role_tag} {role!r}; expected {', '.join(roles)}.{hint}"
            )
        try:
            turns.append(Turn(roles[role], _read_text(message, columns.content_tag)))
        except RowError as error:
            raise RowError(f"turn {number}: {error}") from None
    return turns


def _read_text(row: dict[str, Any], key: str, *, empty: bool = False) -> str:
    """Return the text under `key`.

    Args:
        empty: whether empty text is allowed.
    """
    if key not in row:
        misspelled = [name for name in row if did_you_mean(name, [key])]
        raise RowError(f"`{key}` is missing" + (f" (misspelled as `{misspelled[0]}`?)" if misspelled else ""))
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f"`{key}` should be text, not {_type_name(value)}")
    if not empty and not value.strip():
        raise RowError(f"`{key}` is empty")
    _check_text(value, key)
    return value


def _check_text(value: str, key: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"`{key}` contains half of a surrogate pair, which is not a valid character") from None


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")
