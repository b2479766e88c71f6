"""Convert a Jinja chat template to an Ollama TEMPLATE (Go), by measuring what the Jinja template renders.

If a template only puts text before and after each turn, a few conversations rendered with marks as contents
determine it completely. The measured template is then compared with the Jinja template on a set of
conversations. A template that does more (trims, reorders, inserts the date) renders them differently and is
rejected.

Ollama's side: https://github.com/ollama/ollama/blob/main/docs/template.mdx. Ollama joins consecutive turns of
the same role, puts SYSTEM before the conversation, and lets the model continue if the last turn is the
assistant's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_fish.errors import FishError

Message = tuple[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""(messages as (role, content), add_generation_prompt) -> text; FishError for messages that it cannot render."""

_SYSTEM, _USER, _ANSWER, _NEXT = "系统S9", "问题U1", "回答A2", "追问U3"


@dataclass(frozen=True)
class GoTemplate:
    """The text that a chat template puts around each turn.

    Attributes:
        prelude: text at the start of every prompt.
        default_system: text after the prelude if the conversation has no system turn.
        turns: role -> (text before the content, text after it); without "system" if the template does not
            support it.
    """

    prelude: str
    default_system: str
    turns: dict[str, tuple[str, str]]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return the prompt that Ollama renders for these messages."""
        text = self.prelude + ("" if messages[0][0] == "system" else self.default_system)
        for role, content in messages:
            before, after = self.turns[role]
            text += before + content + after
        return text + (self.turns["assistant"][0] if add_generation_prompt else "")

    def text(self, *, system: str | None = None) -> str:
        """Return the Go source of the TEMPLATE.

        Args:
            system: system prompt for conversations without one, instead of the template's default.
        """
        default = self.default_system
        if system is not None:
            before, after = self.turns["system"]
            default = before + system + after
        roles = [role for role in ("system", "user") if role in self.turns]
        lines = [literal(self.prelude)]
        lines.append("{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}")
        if default:
            lines.append(f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{literal(default)}{{{{ end }}}}')
        for index, role in enumerate(roles):
            before, after = self.turns[role]
            keyword = "else if" if index else "if"
            lines.append(f'{{{{ {keyword} eq .Role "{role}" }}}}{literal(before)}{{{{ .Content }}}}{literal(after)}')
        before, after = self.turns["assistant"]
        lines.append(f'{{{{ else if eq .Role "assistant" }}}}{literal(before)}{{{{ .Content }}}}')
        lines.append(f"{{{{ if not $last }}}}{literal(after)}{{{{ end }}}}{{{{ end }}}}")
        if before:
            lines.append(f'{{{{ if and $last (ne .Role "assistant") }}}}{literal(before)}{{{{ end }}}}')
        return "".join([*lines, "{{ end }}"])


def literal(text: str) -> str:
    """Return Go template source that renders as `text`.

    Text that Go or the Modelfile parser would misinterpret becomes a Go string.
    """
    if not text:
        return ""
    needs_quotes = "{{" in text or text[-1] == "{" or '"""' in text or text[0] == '"' or text[-1] == '"'
    if not needs_quotes and all(survives_modelfile_parser(character) for character in text):
        return text
    return "{{ " + go_string(text) + " }}"


def go_string(text: str) -> str:
    """Return a quoted Go string; characters that Go does not print are escaped."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    pieces = []
    for character in text:
        if character in escapes:
            pieces.append(escapes[character])
        elif survives_modelfile_parser(character):
            pieces.append(character)
        else:
            pieces.append(f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}")
    return '"' + "".join(pieces).replace("{{", "{\\u007b") + '"'


def survives_modelfile_parser(character: str) -> bool:
    """Return whether the Modelfile parser keeps a character: printable ones, newlines and tabs."""
    return character in "\n\r\t" or character.isprintable()


def go_template(render: Render, *, bos: str = "") -> GoTemplate:
    """Measure a Jinja chat template.

    Args:
        render: renders a conversation with the Jinja template.
        bos: BOS token, if the runner puts it before every prompt; it is removed from the start of the prompt.

    Raises:
        FishError: the template does more than put text around the turns.
    """
    unsupported = FishError(
        "this chat template does more than put text around each turn, so it cannot be expressed as an Ollama TEMPLATE; "
        "train with --template chatml or alpaca, or use --to-gguf with llama.cpp, which reads the Jinja template."
    )
    try:
        template = _measure(render)
        for messages in _test_conversations("system" in template.turns):
            if template.render(messages) != render(messages, True):
                raise unsupported
    except ValueError as error:  # a mark is missing from the rendered text, or occurs more than once
        raise unsupported from error
    return _without_bos(template, bos) if bos else template


def _without_bos(template: GoTemplate, bos: str) -> GoTemplate:
    """Return the template without the BOS token at the start of a prompt."""
    if template.prelude:
        return GoTemplate(template.prelude.removeprefix(bos), template.default_system, template.turns)
    turns = dict(template.turns)
    if "system" in turns and template.default_system.startswith(bos):
        turns["system"] = (turns["system"][0].removeprefix(bos), turns["system"][1])
    return GoTemplate("", template.default_system.removeprefix(bos), turns)


def _measure(render: Render) -> GoTemplate:
    """Derive the text around each turn from conversations whose contents are marks.

    The second user turn shows what opens a user turn; the first one starts with the prelude and the default
    system turn too.

    Raises:
        ValueError: the marks are not where a template of this kind puts them.
    """
    one_turn = render([("user", _USER)], False)
    start, close_user = _split_at(one_turn, _USER)
    open_answer = render([("user", _USER)], True)[len(one_turn) :]
    two_turns = render([("user", _USER), ("assistant", _ANSWER)], False)
    _, close_answer = _split_at(two_turns, _ANSWER)
    three_turns = render([("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)], False)
    third_turn = three_turns[len(two_turns) :] if three_turns.startswith(two_turns) else ""
    open_user, _ = _split_at(third_turn, _NEXT)
    if not start.endswith(open_user):
        raise ValueError
    before_user = start[: len(start) - len(open_user)]
    turns = {"user": (open_user, close_user), "assistant": (open_answer, close_answer)}
    try:
        with_system = render([("system", _SYSTEM), ("user", _USER)], False)
    except FishError:
        return GoTemplate(before_user, "", turns)
    head, rest = _split_at(with_system, _SYSTEM)
    close_system = rest[: rest.index(open_user + _USER)] if open_user else rest[: rest.index(_USER)]
    prelude = _common_prefix(head, before_user) if before_user else ""
    if prelude == head and before_user != prelude:
        prelude = ""  # the common text is the start of the system turn itself, so there is no prelude
    turns = {"system": (head[len(prelude) :], close_system), **turns}
    return GoTemplate(prelude, before_user[len(prelude) :], turns)


def _split_at(text: str, mark: str) -> tuple[str, str]:
    """Return the text before and after a mark that must occur exactly once."""
    if text.count(mark) != 1:
        raise ValueError
    before, _, after = text.partition(mark)
    return before, after


def _common_prefix(one: str, other: str) -> str:
    """Return the longest common prefix of two strings."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _test_conversations(has_system: bool) -> list[list[Message]]:
    """Return conversations that templates are known to treat specially: newlines, code, braces, tags, digits."""
    contents = [
        "水为什么会结冰？",
        "a",
        "1. x\n2. y",
        "{{ .Role }} {% if %}",
        "<think>x</think> \\n",
        "24℃？",
        "print('你好')",
    ]
    conversations: list[list[Message]] = []
    for index, content in enumerate(contents):
        other = contents[(index + 3) % len(contents)]
        conversations.append([("user", content)])
        conversations.append([("user", content), ("assistant", other), ("user", content + other)])
        if has_system:
            conversations.append([("system", other), ("user", content)])
            conversations.append([("system", content), ("user", other), ("assistant", content), ("user", other)])
    return conversations
