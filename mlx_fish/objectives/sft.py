"""Supervised fine-tuning on conversations: the assistant's answers, end tokens included, are supervised."""

from collections.abc import Sequence

from mlx_fish.data.batches import make_batch
from mlx_fish.data.examples import Example, Mistakes, Turn
from mlx_fish.data.formats.rows import CONVERSATIONS
from mlx_fish.data.templates.template import Template, TemplateTimeoutError
from mlx_fish.data.tokens import Tokens
from mlx_fish.errors import FishError
from mlx_fish.objectives.objective import Objective, negative_log_likelihood


def tokenise(examples: Sequence[Example], template: Template, max_length: int, mistakes: Mistakes) -> list[Tokens]:
    """Tokenise each conversation into one row, truncated to `max_length` ids.

    Conversations that the template rejects, or that have no supervised token within the limit, are added to
    `mistakes`.
    """
    rows = []
    for example in examples:
        try:
            rows.append(template.tokens(example, max_length))
        except TemplateTimeoutError:
            raise
        except FishError as error:
            mistake = str(error)
            mistakes.add(mistake if mistake.startswith(example.where) else f"{example.where}: {mistake}")
    return rows


def opening(example: Example) -> tuple[Turn, ...]:
    """Return the turns before the first answer."""
    first_answer = next(number for number, turn in enumerate(example.turns) if turn.role == "assistant")
    return example.turns[:first_answer]


SFT = Objective(
    name="sft",
    rows=CONVERSATIONS,
    opening=opening,
    tokenise=tokenise,
    collate=make_batch,
    loss=negative_log_likelihood,
)
