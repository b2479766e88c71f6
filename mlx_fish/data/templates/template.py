"""Render and tokenise examples with a prompt template, and mark the supervised tokens.

A template is a Jinja chat template, built-in or the tokenizer's own, rendered by transformers in a sandbox.
Training renders a conversation turn by turn. The text before an answer is the prompt, exactly as `generate`
renders it. The text that the template adds for the answer, up to and including the end token, is supervised:

    ### Instruction:\n为什么天是蓝的？\n\n### Response:\n  因为……  <|endoftext|>  \n\n
    ^------------------- prompt -------------------^  ^---- supervised ----^  ^ context of the next turn
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
    """A template did not terminate in time. Raised immediately, because other rows would fail the same way."""


def check_template_name(name: str) -> None:
    """Check a template name before anything is loaded.

    Raises:
        FishError: the name is unknown (a similar one is suggested).
    """
    if name not in NAMES:
        raise FishError(f"--template {name}: expected one of {', '.join(NAMES)}.{did_you_mean(name, NAMES)}")


class Template:
    """A prompt template bound to a tokenizer, which renders and tokenises prompts and training rows.

    Attributes:
        name: `chat` for the tokenizer's own chat template, else a name in BUILT_IN.
        jinja: the source of the chat template, for `chat_template.jinja`.
        bos: the BOS token that the tokenizer adds to every text. Empty if it adds none.
        end_token, end_token_id: the token that ends an answer, and its id.

    Raises:
        FishError: the tokenizer lacks the end token, or has no chat template and `name` is `chat`.
    """

    def __init__(self, name: str, tokenizer: Any):
        check_template_name(name)
        assert name != "auto", "resolve `auto` with choose_template"
        self.name = name
        self.tokenizer = tokenizer
        built_in = BUILT_IN.get(name)
        self.input_joiner = built_in.input_joiner if built_in else "\n"
        self.bos = _bos(tokenizer)
        self.jinja = _bind(built_in.jinja, tokenizer, self.bos) if built_in else _tokenizer_template(tokenizer)
        if built_in:
            self.end_token = built_in.end_token or _eos(tokenizer)
        else:
            self.end_token = self._find_end_token()
        ids = tokenizer.encode(self.end_token, add_special_tokens=False)
        if len(ids) != 1:
            raise FishError(
                f"template {name} ends an answer with {self.end_token}, which is not a single token of this model's "
                "tokenizer; use another --template."
            )
        self.end_token_id = int(ids[0])
        # Use the tokens' `special` flag: `all_special_tokens` lists only the tokens named in the tokenizer's
        # config.
        added_tokens = tokenizer.added_tokens_decoder.values()
        self._special_tokens = [str(token) for token in added_tokens if token.special or str(token) == self.end_token]

    def prompt(self, turns: tuple[Turn, ...]) -> str:
        """Return the prompt text for the next answer."""
        return self._render(turns, add_generation_prompt=True)

    def prompt_ids(self, turns: tuple[Turn, ...]) -> list[int]:
        """Return the token ids of the prompt, identical to those before the answer in training.

        Raises:
            FishError: a turn contains a special token.
        """
        for turn in turns:
            self._check_special_tokens(turn, "the prompt")
        ids: list[int] = []
        for text, _ in self._segments(turns, "the prompt"):
            ids += self._encode(text)
        return ids

    def document_ids(self, text: str, where: str) -> list[int]:
        """Return the token ids of a raw text, with the BOS that the tokenizer adds (if any) and the end token.

        Args:
            where: `file:line` of the text, for error messages.

        Raises:
            FishError: the text contains a special token.
        """
        self._check_special_tokens(Turn("document", text), where)
        return [*self._encode(self.bos), *self._encode(text), self.end_token_id]

    def answer_text(self, ids: list[int]) -> str:
        """Decode an answer, dropping a last character whose bytes are incomplete."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).rstrip("�")

    def tokens(self, example: Example, max_length: int) -> Tokens:
        """Tokenise a training row, truncated to `max_length` ids.

        Raises:
            FishError: the row contains a special token as text, the template changes an answer or an earlier
                turn, or no supervised token is left within the limit.
        """
        for turn in example.turns:
            self._check_special_tokens(turn, example.where)
        ids: list[int] = []
        supervised: list[bool] = []
        for text, is_supervised in self._segments(example.turns, example.where):
            segment_ids = self._encode(text)
            ids += segment_ids
            supervised += [is_supervised] * len(segment_ids)
        while not supervised[-1]:  # tokens after the last answer predict no supervised token
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
                f"{example.where}: the prompt alone fills --max-seq-length {max_length} (the row has {len(ids)} "
                "tokens), so no supervised token is left; raise the limit or shorten the row."
            )
        return tokens

    def _segments(self, turns: tuple[Turn, ...], where: str) -> list[tuple[str, bool]]:
        """Split a rendered conversation into (text, is supervised) segments.

        Each segment is tokenised separately, so that the prompt has the same ids in training as in generation.

        Raises:
            FishError: the template changes an answer, or changes earlier turns when a later turn is added.
        """
        segments: list[tuple[str, bool]] = []
        rendered = ""  # the text covered by `segments`
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._render(turns[:number], add_generation_prompt=True)
            with_answer = self._render(turns[: number + 1], add_generation_prompt=False)
            if not prompt.startswith(rendered) or not with_answer.startswith(prompt):
                raise FishError(
                    f"{where}: template {self.name} changes earlier turns when a later turn is added; "
                    "use another --template, such as chatml."
                )
            answer, end, remainder = with_answer[len(prompt) :].rpartition(self.end_token)
            if not end or answer not in (turn.content, turn.content.strip()):
                raise FishError(
                    f"{where}: template {self.name} does not render the answer unchanged; "
                    "use another --template, such as chatml."
                )
            segments += [(prompt[len(rendered) :], False), (answer + end, True)]
            rendered = with_answer[: len(with_answer) - len(remainder)]
        conversation = self._render(turns, add_generation_prompt=turns[-1].role != "assistant")
        if not conversation.startswith(rendered):
            raise FishError(
                f"{where}: template {self.name} changes earlier turns when a later turn is added; "
                "use another --template, such as chatml."
            )
        if conversation[len(rendered) :]:
            segments.append((conversation[len(rendered) :], False))
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
            return render() if self.name in BUILT_IN else within(render)  # an untrusted template may not terminate
        except TimeoutError as error:
            raise TemplateTimeoutError(
                f"template {self.name}: {error} with this conversation; use another --template."
            ) from error
        except Exception as error:  # errors from Jinja, and exceptions that a template raises
            raise FishError(
                f"template {self.name} cannot render this conversation ({error}); use another --template."
            ) from error

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _find_end_token(self) -> str:
        """Return the special token that the tokenizer's own template writes after an answer.

        Raises:
            FishError: the answer is not followed by a special token.
        """
        answer = "答案ANSWER"
        turns = (Turn("user", "问题"), Turn("assistant", answer))
        _, separator, remainder = self._render(turns, add_generation_prompt=False).rpartition(answer)
        candidates = [token for token in self.tokenizer.get_added_vocab() if separator and remainder.startswith(token)]
        if not candidates:
            raise FishError(
                "the tokenizer's own chat template writes no end token after an answer; "
                "use --template chatml or alpaca."
            )
        return str(max(candidates, key=len))

    def _check_special_tokens(self, turn: Turn, where: str) -> None:
        """Raise a FishError if the turn contains a special token."""
        for token in self._special_tokens:
            if token in turn.content or token in turn.input:
                raise FishError(
                    f"{where}: the {turn.role} turn contains {token}, which the model reads as a control token; "
                    "remove it."
                )


def choose_template(name: str, tokenizer: Any, folder: ModelFolder) -> Template:
    """Return the template with the given name, resolving `auto`.

    `auto` selects the tokenizer's own chat template if the model stops at its end token, else alpaca. A base
    model may have a tokenizer with a chat template, but it was never trained on the end token `<|im_end|>`
    and would not stop.
    """
    if name != "auto":
        return Template(name, tokenizer)
    if getattr(tokenizer, "chat_template", None):
        try:
            chat_template = Template("chat", tokenizer)
        except TemplateTimeoutError:
            raise
        except FishError:
            return Template("alpaca", tokenizer)
        if chat_template.end_token_id in folder.end_token_ids:
            return chat_template
    return Template("alpaca", tokenizer)


def _bind(jinja: str, tokenizer: Any, bos: str) -> str:
    """Replace the placeholders EOS and BOS with the tokenizer's tokens as literals; an empty `bos` removes BOS."""
    return jinja.replace("EOS", repr(_eos(tokenizer)) if "EOS" in jinja else "").replace(
        "{{- BOS -}}", f"{{{{- {bos!r} -}}}}" if bos else ""
    )


def _bos(tokenizer: Any) -> str:
    """Return the BOS token if the tokenizer adds it to every text, else an empty string."""
    adds_bos = tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token or "") if adds_bos else ""


def _eos(tokenizer: Any) -> str:
    if not tokenizer.eos_token:
        raise FishError("this model's tokenizer has no end token (eos_token); use --template chatml.")
    return str(tokenizer.eos_token)


def _tokenizer_template(tokenizer: Any) -> str:
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        raise FishError("this model's tokenizer has no chat template of its own; use --template chatml or alpaca.")
    return str(tokenizer.chat_template)
