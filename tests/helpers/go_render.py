"""A small renderer of Go's text/template, written from its documentation: enough for Ollama's chat templates.

It shares nothing with the package: what renders a TEMPLATE here has no idea how it was made. Ollama's part is `ollama_prompt`:
it puts SYSTEM before the conversation and joins neighbouring turns of one role before it executes the template.
"""

import json
import re
from typing import Any

_ACTION = re.compile(r"\{\{(-\s)?(.*?)(\s-)?\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:\\.|[^"\\])*"|`[^`]*`|[()]|:=|=|,|[^\s(),]+')


def ollama_prompt(template: str, messages: list[dict[str, str]], system: str = "") -> str:
    if system and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += "\n\n" + message["content"]
        else:
            joined.append(dict(message))
    data = {
        "Messages": [{"Role": message["role"], "Content": message["content"]} for message in joined],
        "System": "\n\n".join(message["content"] for message in joined if message["role"] == "system"),
    }
    return render(template, data)


def render(template: str, data: Any) -> str:
    nodes, rest, _ = _parse(_lex(template))
    assert not rest
    return _Run(data).block(nodes, data)


def _lex(template: str) -> list[tuple[str, str]]:
    found, end, trim = [], 0, False
    for match in _ACTION.finditer(template):
        text = template[end : match.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        text = text.rstrip(" \t\r\n") if match[1] else text
        found.append(("text", text))
        if not match[2].startswith("/*"):
            found.append(("action", match[2].strip()))
        end, trim = match.end(), bool(match[3])
    tail = template[end:]
    return [*found, ("text", tail.lstrip(" \t\r\n") if trim else tail)]


def _parse(tokens: list[tuple[str, str]]) -> tuple[list[Any], list[tuple[str, str]], str]:
    """(nodes, tokens left, the action that closed them)."""
    nodes: list[Any] = []
    while tokens:
        (kind, text), tokens = tokens[0], tokens[1:]
        if kind == "text":
            nodes.append(("text", text))
        elif text == "end" or text == "else" or text.startswith("else "):
            return nodes, tokens, text
        elif text.startswith(("if ", "range ")):
            keyword, condition = text.split(" ", 1)
            body, tokens, closed = _parse(tokens)
            other: list[Any] = []
            if closed.startswith("else if "):
                inner, tokens, _ = _parse([("action", closed[5:]), *tokens])
                # the inner `if` took the `end` that closes both: what follows belongs here
                other, rest = inner[:1], inner[1:]
                nodes += [(keyword, condition, body, other), *rest]
                return nodes, tokens, _
            if closed == "else":
                other, tokens, closed = _parse(tokens)
            assert closed == "end", closed
            nodes.append((keyword, condition, body, other))
        else:
            nodes.append(("output", text))
    return nodes, tokens, ""


class _Run:
    def __init__(self, data: Any):
        self.variables: list[dict[str, Any]] = [{"$": data}]

    def block(self, nodes: list[Any], dot: Any) -> str:
        self.variables.append({})
        text = "".join(self.node(node, dot) for node in nodes)
        self.variables.pop()
        return text

    def node(self, node: Any, dot: Any) -> str:
        if node[0] == "text":
            return str(node[1])
        if node[0] == "output":
            if match := re.match(r"(\$\w+)\s*:=\s*(.*)", node[1], re.DOTALL):
                self.variables[-1][match[1]] = self.pipeline(match[2], dot)
                return ""
            value = self.pipeline(node[1], dot)
            return str(value)
        if node[0] == "if":
            return self.block(node[2] if self.pipeline(node[1], dot) else node[3], dot)
        match = re.match(r"(?:(\$\w+),\s*(\$\w+)\s*:=\s*)?(.*)", node[1], re.DOTALL)
        assert match is not None
        text = ""
        for index, item in enumerate(self.pipeline(match[3], dot)):
            self.variables.append({match[1]: index, match[2]: item} if match[1] else {})
            text += self.block(node[2], item)
            self.variables.pop()
        return text

    def pipeline(self, text: str, dot: Any) -> Any:
        words = _WORD.findall(text)
        value, rest = self.call(words, dot)
        assert not rest, rest
        return value

    def call(self, words: list[str], dot: Any) -> tuple[Any, list[str]]:
        first, words = words[0], words[1:]
        values = []
        if first not in _FUNCTIONS:
            return self.operand(first, words, dot)
        while words and words[0] != ")":
            value, words = self.operand(words[0], words[1:], dot)
            values.append(value)
        return _FUNCTIONS[first](*values), words

    def operand(self, word: str, words: list[str], dot: Any) -> tuple[Any, list[str]]:
        if word == "(":
            value, words = self.call(words, dot)
            assert words[0] == ")"
            return value, words[1:]
        if word[0] == '"':
            return _unquoted(word), words
        if re.fullmatch(r"-?\d+", word):
            return int(word), words
        name, *fields = word.split(".")
        value = dot if name == "" else next(scope[name] for scope in reversed(self.variables) if name in scope)
        for field in fields:
            value = value[field] if field else value
        return value, words


def _unquoted(word: str) -> str:
    """A Go string: JSON's escapes, and \\U with eight digits."""
    plain = re.sub(r"\\U([0-9a-f]{8})", lambda match: json.dumps(chr(int(match[1], 16)))[1:-1], word)
    return str(json.loads(plain))


_FUNCTIONS = {
    "eq": lambda one, *others: any(one == other for other in others),
    "ne": lambda one, other: one != other,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "not": lambda value: not value,
    "len": len,
    "slice": lambda items, start: items[start:],
}
