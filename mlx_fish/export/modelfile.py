"""Read and write Ollama's Modelfile format.

The reader accepts exactly what Ollama's parser accepts, and the writer checks its output with the reader. The
format: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx. Details that the page omits follow
parser/parser.go: there are no escapes, a value in `\"\"\"` ends at the first line that ends in `\"\"\"`, and
characters that Go does not print are dropped.
"""

from dataclasses import dataclass

COMMANDS = (
    *("from", "license", "template", "system", "adapter", "draft", "renderer"),
    *("parser", "parameter", "message", "requires"),
)
ROLES = ("system", "user", "assistant")
_QUOTES = '"""'


class ModelfileError(ValueError):
    """A Modelfile that Ollama cannot parse, with the message of Ollama's parser."""


@dataclass(frozen=True)
class Command:
    """One instruction.

    Attributes:
        name: the keyword in lower case; `model` for FROM, and the parameter's name for PARAMETER.
        args: the value, without its quotes.
    """

    name: str
    args: str


def read_modelfile(text: str) -> list[Command]:
    """Parse a Modelfile into its commands, exactly as Ollama's parser does.

    Raises:
        ModelfileError: the text is not a valid Modelfile.
    """
    commands = _Reader(text.removeprefix("\ufeff")).commands()
    if not any(command.name == "model" for command in commands):
        raise ModelfileError("no FROM line")
    return commands


class _Reader:
    """A parser that reads a Modelfile character by character, like Ollama's."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.line = 1

    def commands(self) -> list[Command]:
        commands = []
        while (character := self._next()) is not None:
            if character == "#":
                while self._next() not in (None, "\n", "\r"):
                    pass
            elif character not in " \t\n\r":
                commands.append(self._command(character))
        return commands

    def _command(self, first: str) -> Command:
        word = self._word(first, str.isalpha).lower()
        if word not in COMMANDS:
            raise ModelfileError(f"(line {self.line}): command must be one of {_quoted_list(COMMANDS)}")
        role, name = "", {"from": "model"}.get(word, word)
        if word == "parameter":
            name = self._word("", lambda character: character.isalnum() or character == "_")
        elif word == "message":
            role = self._word("", str.isalpha)
            if role not in ROLES:
                raise ModelfileError(f"(line {self.line}): message role must be one of {_quoted_list(ROLES)}")
            role += ": "
        return Command(name, role + self._value())

    def _word(self, first: str, is_allowed: "type[str] | object") -> str:
        """Read up to the next blank; ASCII only, like Ollama's isAlpha and isNumber."""
        word = first
        while (character := self._next()) is not None:
            if character in " \t":
                return word
            if not (character.isascii() and is_allowed(character)):  # type: ignore[operator]
                if first:
                    raise ModelfileError(f"(line {self.line}): command must be one of {_quoted_list(COMMANDS)}")
                raise ModelfileError("unexpected EOF")
            word += character
        raise ModelfileError("unexpected EOF")

    def _value(self) -> str:
        """Read up to the end of the line on which the value's quotes, if any, are closed."""
        value = ""
        while (character := self._next()) is not None:
            if character in "\n\r" and (unquoted := _unquoted(value.strip())) is not None:
                return unquoted
            value += character if character in " \t\n\r" or character.isprintable() else ""
        unquoted = _unquoted(value.strip())
        if unquoted is None:
            raise ModelfileError("unexpected EOF")
        return unquoted

    def _next(self) -> str | None:
        if self.position == len(self.text):
            return None
        character = self.text[self.position]
        self.position += 1
        self.line += character in "\n\r"
        return character


def _unquoted(value: str) -> str | None:
    """Return the value without its quotes; None if the quotes are not closed yet."""
    for quotes in (_QUOTES, '"'):
        if value.startswith(quotes):
            is_closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if is_closed else None
    return value


def _quoted_list(words: tuple[str, ...]) -> str:
    quoted = [f'"{word}"' for word in words]
    return ", ".join(quoted[:-1]) + f", or {quoted[-1]}"


def written(keyword: str, value: str) -> str:
    """Return the command that Ollama parses as this value, including its newline.

    Args:
        keyword: such as `SYSTEM`, or `PARAMETER stop`.

    Raises:
        ModelfileError: the format cannot express this value.
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
