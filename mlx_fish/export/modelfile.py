"""The grammar of Ollama's Modelfile: a reader that takes what Ollama's parser takes, and a writer checked by that reader.

https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx, and parser/parser.go for what it leaves unsaid: there are no
escapes, a value in `\"\"\"` ends at the first line that ends in `\"\"\"`, and characters that Go does not print are dropped.
"""

from dataclasses import dataclass

COMMANDS = (
    *("from", "license", "template", "system", "adapter", "draft", "renderer"),
    *("parser", "parameter", "message", "requires"),
)
ROLES = ("system", "user", "assistant")
_QUOTES = '"""'


class ModelfileError(ValueError):
    """What Ollama's parser would say."""


@dataclass(frozen=True)
class Command:
    """One instruction: `name` is `model` for FROM, and the parameter's own name for PARAMETER."""

    name: str
    args: str


def read_modelfile(text: str) -> list[Command]:
    """The commands of a Modelfile, exactly as Ollama's parser finds them.

    Raises:
        ModelfileError: with that parser's message.
    """
    commands = _Reader(text.removeprefix("\ufeff")).commands()
    if not any(command.name == "model" for command in commands):
        raise ModelfileError("no FROM line")
    return commands


class _Reader:
    def __init__(self, text: str):
        self.text = text
        self.at = 0
        self.line = 1

    def commands(self) -> list[Command]:
        found = []
        while (character := self._next()) is not None:
            if character == "#":
                while self._next() not in (None, "\n", "\r"):
                    pass
            elif character not in " \t\n\r":
                found.append(self._command(character))
        return found

    def _command(self, first: str) -> Command:
        word = self._word(first, str.isalpha).lower()
        if word not in COMMANDS:
            raise ModelfileError(f"(line {self.line}): command must be one of {_listed(COMMANDS)}")
        role, name = "", {"from": "model"}.get(word, word)
        if word == "parameter":
            name = self._word("", lambda character: character.isalnum() or character == "_")
        elif word == "message":
            role = self._word("", str.isalpha)
            if role not in ROLES:
                raise ModelfileError(f"(line {self.line}): message role must be one of {_listed(ROLES)}")
            role += ": "
        return Command(name, role + self._value())

    def _word(self, first: str, belongs: "type[str] | object") -> str:
        """Up to the next blank; ASCII only, as Ollama's isAlpha and isNumber are."""
        word = first
        while (character := self._next()) is not None:
            if character in " \t":
                return word
            if not (character.isascii() and belongs(character)):  # type: ignore[operator]
                if first:
                    raise ModelfileError(f"(line {self.line}): command must be one of {_listed(COMMANDS)}")
                raise ModelfileError("unexpected EOF")
            word += character
        raise ModelfileError("unexpected EOF")

    def _value(self) -> str:
        """Up to the end of a line at which the quotes, if any, are closed."""
        value = ""
        while (character := self._next()) is not None:
            if character in "\n\r" and (whole := _unquoted(value.strip())) is not None:
                return whole
            value += character if character in " \t\n\r" or character.isprintable() else ""
        whole = _unquoted(value.strip())
        if whole is None:
            raise ModelfileError("unexpected EOF")
        return whole

    def _next(self) -> str | None:
        if self.at == len(self.text):
            return None
        character = self.text[self.at]
        self.at += 1
        self.line += character in "\n\r"
        return character


def _unquoted(value: str) -> str | None:
    """None while a quoted value is still open."""
    for quotes in (_QUOTES, '"'):
        if value.startswith(quotes):
            whole = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if whole else None
    return value


def _listed(words: tuple[str, ...]) -> str:
    quoted = [f'"{word}"' for word in words]
    return ", ".join(quoted[:-1]) + f", or {quoted[-1]}"


def written(keyword: str, value: str) -> str:
    """One command that Ollama reads back as this value.

    Args:
        keyword: such as `SYSTEM`, or `PARAMETER stop`.

    Raises:
        ModelfileError: the grammar has no way to say this value.
    """
    plain = f"{keyword} {value}\n"
    forms = [f"{keyword} {_QUOTES}{value}{_QUOTES}\n"]
    if value and "\n" not in value and not value.startswith('"'):
        forms.insert(0, plain)
    for form in forms:
        try:
            if [command.args for command in read_modelfile("FROM x\n" + form)[1:]] == [value]:
                return form
        except ModelfileError:
            continue
    raise ModelfileError(f"{keyword} cannot hold this text")
