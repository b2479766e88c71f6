"""Continued pretraining on raw text: every token of a document and the end token after it are supervised.

document   B a b c d e f g h E        B: the tokenizer's BOS token, if it adds one; E: its end token
rows of 5  B a b c d
                   d e f g h          a row starts with the last token of the previous one, so that each token
                           h E        is predicted once
"""

from collections.abc import Sequence

import numpy as np

from mlx_fish.data.batches import make_batch
from mlx_fish.data.examples import Example, Mistakes, Turn
from mlx_fish.data.formats.rows import DOCUMENTS
from mlx_fish.data.templates.template import Template
from mlx_fish.data.tokens import Tokens
from mlx_fish.errors import FishError
from mlx_fish.objectives.objective import Objective, negative_log_likelihood

OPENING_CHARACTERS = 40  # maximum length of the prompt of a sample answer


def tokenise(examples: Sequence[Example], template: Template, max_length: int, mistakes: Mistakes) -> list[Tokens]:
    """Tokenise each document into rows of at most `max_length` ids. Documents with control tokens go to `mistakes`."""
    rows: list[Tokens] = []
    for example in examples:
        try:
            ids = template.document_ids(example.turns[0].content, example.where)
        except FishError as error:
            mistakes.add(str(error))
            continue
        starts = range(0, len(ids) - 1, max_length - 1)
        for number, start in enumerate(starts, 1):
            piece = np.array(ids[start : start + max_length], np.int32)
            where = example.where if len(starts) == 1 else f"{example.where} (part {number} of {len(starts)})"
            rows.append(Tokens(piece, np.ones(len(piece), np.bool_), where))
    return rows


def opening(example: Example) -> tuple[Turn, ...]:
    """Return the beginning of the document, at most half of it, as a user turn."""
    text = example.turns[0].content
    return (Turn("user", text[: min(OPENING_CHARACTERS, -(-len(text) // 2))]),)


PT = Objective(
    name="pt",
    rows=DOCUMENTS,
    opening=opening,
    tokenise=tokenise,
    collate=make_batch,
    loss=negative_log_likelihood,
    template="empty",
)
