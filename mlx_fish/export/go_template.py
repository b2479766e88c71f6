"""A chat template -> the Go TEMPLATE of an Ollama model, found by measuring what the Jinja template renders.

A template that only puts text before and after each turn is fully known from a few conversations rendered with marks in
place of the contents. What was measured is then rendered beside the Jinja template for a set of conversations; one that
does more (trims, reorders, looks at the date) does not agree, and is refused.

Ollama's side: https://github.com/ollama/ollama/blob/main/docs/template.mdx. It joins neighbouring turns of one role, puts
SYSTEM before the conversation, and lets the model continue when the last turn is the assistant's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_fish.errors import FishError

Message = tuple[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""(messages as (role, content), add_generation_prompt) -> text; raises FishError when it cannot."""

_SYSTEM, _USER, _ANSWER, _NEXT = "系统S9", "问题U1", "回答A2", "追问U3"


@dataclass(frozen=True)
class GoTemplate:
    """What stands around each turn.

    Attributes:
        prelude: before everything.
        default_system: after the prelude when the conversation brings no system turn.
        turns: role -> (text before its content, text after it); without "system" when the template knows none.
    """

    prelude: str
    default_system: str
    turns: dict[str, tuple[str, str]]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """What Ollama will make of it."""
        text = self.prelude + ("" if messages[0][0] == "system" else self.default_system)
        for role, content in messages:
            before, after = self.turns[role]
            text += before + content + after
        return text + (self.turns["assistant"][0] if add_generation_prompt else "")

    def text(self, *, system: str | None = None) -> str:
        """The TEMPLATE's text.

        Args:
            system: a prompt to put before conversations that bring none, in place of the template's own default.
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
        for number, role in enumerate(roles):
            before, after = self.turns[role]
            keyword = "else if" if number else "if"
            lines.append(f'{{{{ {keyword} eq .Role "{role}" }}}}{literal(before)}{{{{ .Content }}}}{literal(after)}')
        before, after = self.turns["assistant"]
        lines.append(f'{{{{ else if eq .Role "assistant" }}}}{literal(before)}{{{{ .Content }}}}')
        lines.append(f"{{{{ if not $last }}}}{literal(after)}{{{{ end }}}}{{{{ end }}}}")
        if before:
            lines.append(f'{{{{ if and $last (ne .Role "assistant") }}}}{literal(before)}{{{{ end }}}}')
        return "".join([*lines, "{{ end }}"])


def literal(text: str) -> str:
    """Text as it stands in a Go template; what Go or the Modelfile grammar would take for something else, as a Go string."""
    if not text:
        return ""
    harmful = "{{" in text or text[-1] == "{" or '"""' in text or text[0] == '"' or text[-1] == '"'
    if not harmful and all(is_kept(character) for character in text):
        return text
    return "{{ " + go_string(text) + " }}"


def go_string(text: str) -> str:
    """A quoted Go string of printing ASCII and of what Go prints."""
    named = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    pieces = []
    for character in text:
        if character in named:
            pieces.append(named[character])
        elif is_kept(character):
            pieces.append(character)
        else:
            pieces.append(f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}")
    return '"' + "".join(pieces).replace("{{", "{\\u007b") + '"'


def is_kept(character: str) -> bool:
    """Survives the Modelfile parser, which drops what Go calls non-printing, but for line ends and tabs."""
    return character in "\n\r\t" or character.isprintable()


def go_template(render: Render, *, bos: str = "") -> GoTemplate:
    """Measure a Jinja template.

    Args:
        render: renders it.
        bos: a token that the runner puts before every prompt by itself; it is left out of the prelude.

    Raises:
        FishError: the template does more than put text around the turns.
    """
    refusal = FishError(
        "this chat template does more than put text around each turn, so no Ollama TEMPLATE can be made of it; train "
        "with --template chatml or alpaca, or use --to-gguf with llama.cpp, which reads the Jinja template."
    )
    try:
        found = _measure(render)
        for messages in _probes("system" in found.turns):
            if found.render(messages) != render(messages, True):
                raise refusal
    except ValueError as error:  # a mark was not found where it should be
        raise refusal from error
    return _without(found, bos) if bos else found


def _without(found: GoTemplate, bos: str) -> GoTemplate:
    """The token taken from wherever a prompt begins."""
    if found.prelude:
        return GoTemplate(found.prelude.removeprefix(bos), found.default_system, found.turns)
    turns = dict(found.turns)
    if "system" in turns and found.default_system.startswith(bos):
        turns["system"] = (turns["system"][0].removeprefix(bos), turns["system"][1])
    return GoTemplate("", found.default_system.removeprefix(bos), turns)


def _measure(render: Render) -> GoTemplate:
    asked = render([("user", _USER)], False)
    start, close_user = _around(asked, _USER)
    open_answer = render([("user", _USER)], True)[len(asked) :]
    whole = render([("user", _USER), ("assistant", _ANSWER)], False)
    _, close_answer = _around(whole, _ANSWER)
    longer = render([("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)], False)
    between = longer[len(whole) :] if longer.startswith(whole) else ""
    open_user, _ = _around(between, _NEXT)
    if not start.endswith(open_user):
        raise ValueError
    before_user = start[: len(start) - len(open_user)]
    turns = {"user": (open_user, close_user), "assistant": (open_answer, close_answer)}
    try:
        with_system = render([("system", _SYSTEM), ("user", _USER)], False)
    except FishError:
        return GoTemplate(before_user, "", turns)
    head, rest = _around(with_system, _SYSTEM)
    close_system = rest[: rest.index(open_user + _USER)] if open_user else rest[: rest.index(_USER)]
    prelude = _common_prefix(head, before_user) if before_user else ""
    if prelude == head and before_user != prelude:
        prelude = ""  # the default system turn begins as any other does: nothing comes before it
    turns = {"system": (head[len(prelude) :], close_system), **turns}
    return GoTemplate(prelude, before_user[len(prelude) :], turns)


def _around(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ValueError
    before, _, after = text.partition(mark)
    return before, after


def _common_prefix(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _probes(has_system: bool) -> list[list[Message]]:
    """Conversations with what templates are known to look at: length, line ends, code, braces, tags, digits."""
    contents = [
        "水为什么会结冰？",
        "a",
        "1. x\n2. y",
        "{{ .Role }} {% if %}",
        "<think>x</think> \\n",
        "24℃？",
        "print('你好')",
    ]
    found: list[list[Message]] = []
    for number, content in enumerate(contents):
        other = contents[(number + 3) % len(contents)]
        found.append([("user", content)])
        found.append([("user", content), ("assistant", other), ("user", content + other)])
        if has_system:
            found.append([("system", other), ("user", content)])
            found.append([("system", content), ("user", other), ("assistant", content), ("user", other)])
    return found
