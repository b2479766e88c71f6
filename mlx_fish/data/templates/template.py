"""Example -> Tokens: the ids of a conversation and which of them are supervised. The same template makes the prompt.

A template is a Jinja chat template, ours or the tokenizer's own, rendered by transformers (sandboxed). Training renders the
conversation turn by turn: what a template puts before an answer is the prompt, exactly as `generate` will render it, and
what it adds for the answer, up to and including the end token, is supervised.

    ### Instruction:\n为什么天是蓝的？\n\n### Response:\n  因为……  <|endoftext|>  \n\n
    ^------------------- prompt -------------------^  ^---- supervised ----^  ^ context of a next turn
"""

from typing import Any

import numpy as np

from mlx_fish.data.examples import Example, Turn
from mlx_fish.data.templates.builtin import BUILT_IN
from mlx_fish.data.templates.deadline import within
from mlx_fish.data.tokens import Tokens
from mlx_fish.errors import FishError, did_you_mean
from mlx_fish.models.folder import ModelFolder

NAMES = ("auto", "chat", *BUILT_IN)


class TemplateTimeoutError(FishError):
    """A template did not end in time; with the next row it would be no better."""


def check_template_name(name: str) -> None:
    """Refuse an unknown template before anything is loaded."""
    if name not in NAMES:
        raise FishError(f"--template {name}: expected one of {', '.join(NAMES)}.{did_you_mean(name, NAMES)}")


class Template:
    """One template bound to one tokenizer: renders prompts and training rows.

    Attributes:
        name: `chat` for the tokenizer's own, else a name in BUILT_IN.
        jinja: the chat template's text, for `chat_template.jinja`.
        bos: what the tokenizer puts before every text by itself; empty: nothing.
        end_token, end_token_id: what ends an answer.
    """

    def __init__(self, name: str, tokenizer: Any):
        check_template_name(name)
        assert name != "auto", "resolve `auto` with choose_template"
        self.name = name
        self.tokenizer = tokenizer
        built_in = BUILT_IN.get(name)
        self.input_joiner = built_in.input_joiner if built_in else "\n"
        self.bos = _bos(tokenizer)
        self.jinja = _bind(built_in.jinja, tokenizer, self.bos) if built_in else _own_template(tokenizer)
        if built_in:
            self.end_token = built_in.end_token or _eos(tokenizer)
        else:
            self.end_token = self._find_end_token()
        ids = tokenizer.encode(self.end_token, add_special_tokens=False)
        if len(ids) != 1:
            raise FishError(
                f"template {name} ends an answer with {self.end_token}, which this model's tokenizer lacks; use another --template."
            )
        self.end_token_id = int(ids[0])
        # By its flag: `all_special_tokens` has only those that the tokenizer's config names.
        added = tokenizer.added_tokens_decoder.values()
        self._specials = [str(token) for token in added if token.special or str(token) == self.end_token]

    def prompt(self, turns: tuple[Turn, ...]) -> str:
        """The text that asks for the next answer."""
        return self._render(turns, add_generation_prompt=True)

    def prompt_ids(self, turns: tuple[Turn, ...]) -> list[int]:
        """The ids of `prompt`, exactly those that training puts before an answer."""
        for turn in turns:
            self._refuse_specials(turn, "the prompt")
        ids: list[int] = []
        for text, _ in self._segments(turns, "the prompt"):
            ids += self._encode(text)
        return ids

    def document_ids(self, text: str, where: str) -> list[int]:
        """A raw text between the tokenizer's BOS, where it adds one by itself, and the end token.

        Raises:
            FishError: the text holds a special token.
        """
        self._refuse_specials(Turn("document", text), where)
        return [*self._encode(self.bos), *self._encode(text), self.end_token_id]

    def answer_text(self, ids: list[int]) -> str:
        """An answer's text, without a last character of which some bytes are still to come."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).rstrip("�")

    def tokens(self, example: Example, max_length: int) -> Tokens:
        """Tokenise a training row, at most `max_length` ids.

        Raises:
            FishError: the row holds a special token as text, the template changes an answer or an earlier turn, or no supervised
                token is left within the limit.
        """
        for turn in example.turns:
            self._refuse_specials(turn, example.where)
        ids: list[int] = []
        supervised: list[bool] = []
        for text, learn in self._segments(example.turns, example.where):
            piece = self._encode(text)
            ids += piece
            supervised += [learn] * len(piece)
        while not supervised[-1]:  # what follows the last answer predicts nothing that is learnt
            ids.pop()
            supervised.pop()
        tokens = Tokens(
            np.array(ids[:max_length], np.int32),
            np.array(supervised[:max_length], np.bool_),
            example.where,
            len(ids) > max_length,
        )
        if tokens.num_supervised == 0:
            raise FishError(
                f"{example.where}: the prompt alone fills --max-seq-length {max_length} (the row has {len(ids)} tokens), "
                "so no supervised token is left; raise the limit or shorten the row."
            )
        return tokens

    def _segments(self, turns: tuple[Turn, ...], where: str) -> list[tuple[str, bool]]:
        """Text pieces and whether they are supervised. Each is tokenised alone, as generation will meet it."""
        segments: list[tuple[str, bool]] = []
        done = ""
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prefix = self._render(turns[:number], add_generation_prompt=True)
            whole = self._render(turns[: number + 1], add_generation_prompt=False)
            if not prefix.startswith(done) or not whole.startswith(prefix):
                raise FishError(
                    f"{where}: template {self.name} changes earlier turns when a later one comes; use --template chatml or another."
                )
            answer, end, rest = whole[len(prefix) :].rpartition(self.end_token)
            if not end or answer not in (turn.content, turn.content.strip()):
                raise FishError(
                    f"{where}: template {self.name} does not render the answer as it is; use --template chatml or another."
                )
            segments += [(prefix[len(done) :], False), (answer + end, True)]
            done = whole[: len(whole) - len(rest)]
        tail = self._render(turns, add_generation_prompt=turns[-1].role != "assistant")
        if not tail.startswith(done):
            raise FishError(
                f"{where}: template {self.name} changes earlier turns when a later one comes; use --template chatml or another."
            )
        if tail[len(done) :]:
            segments.append((tail[len(done) :], False))
        return segments

    def _render(self, turns: tuple[Turn, ...], *, add_generation_prompt: bool) -> str:
        messages = [
            {"role": turn.role, "content": turn.content + (self.input_joiner + turn.input if turn.input else "")}
            for turn in turns
        ]

        def render() -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self.jinja, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )

        try:
            return render() if self.name in BUILT_IN else within(render)  # a stranger's template may never end
        except TimeoutError as error:
            raise TemplateTimeoutError(
                f"template {self.name}: {error} with this conversation; use another --template."
            ) from error
        except Exception as error:  # Jinja's errors, and what a template raises by itself
            raise FishError(
                f"template {self.name} cannot render this conversation ({error}); use another --template."
            ) from error

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _find_end_token(self) -> str:
        """What the tokenizer's own template writes after an answer: it must be one special token."""
        mark = "答案ANSWER"
        turns = (Turn("user", "问题"), Turn("assistant", mark))
        _, found, rest = self._render(turns, add_generation_prompt=False).rpartition(mark)
        specials = [token for token in self.tokenizer.get_added_vocab() if found and rest.startswith(token)]
        if not specials:
            raise FishError(
                "the tokenizer's own chat template writes no end token after an answer; use --template chatml or alpaca."
            )
        return str(max(specials, key=len))

    def _refuse_specials(self, turn: Turn, where: str) -> None:
        for token in self._specials:
            if token in turn.content or token in turn.input:
                raise FishError(
                    f"{where}: the {turn.role} turn contains {token}, which the model reads as a control token; remove it."
                )


def choose_template(name: str, tokenizer: Any, folder: ModelFolder) -> Template:
    """Resolve `auto`: the tokenizer's own template when the model stops at its end token, else alpaca.

    A base model never learnt `<|im_end|>` and would not stop, though its tokenizer may carry a chat template.
    """
    if name != "auto":
        return Template(name, tokenizer)
    if getattr(tokenizer, "chat_template", None):
        try:
            own = Template("chat", tokenizer)
        except TemplateTimeoutError:
            raise
        except FishError:
            return Template("alpaca", tokenizer)
        if own.end_token_id in folder.end_token_ids:
            return own
    return Template("alpaca", tokenizer)


def _bind(jinja: str, tokenizer: Any, bos: str) -> str:
    """Put the tokenizer's own EOS, and BOS where it adds one by itself, into the text as literals."""
    return jinja.replace("EOS", repr(_eos(tokenizer)) if "EOS" in jinja else "").replace(
        "{{- BOS -}}", f"{{{{- {bos!r} -}}}}" if bos else ""
    )


def _bos(tokenizer: Any) -> str:
    """The tokenizer's BOS where it adds one by itself, else nothing."""
    with_bos = tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token or "") if with_bos else ""


def _eos(tokenizer: Any) -> str:
    if not tokenizer.eos_token:
        raise FishError("this model's tokenizer names no end token (eos_token); use --template chatml.")
    return str(tokenizer.eos_token)


def _own_template(tokenizer: Any) -> str:
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        raise FishError("this model's tokenizer has no chat template of its own; use --template chatml or alpaca.")
    return str(tokenizer.chat_template)
