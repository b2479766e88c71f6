"""A tokenised row: token ids and a mask of the supervised ones. Independent of text and tokenizers."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Tokens:
    """A tokenised row, T tokens long.

    Attributes:
        ids: (T,) int32, token ids.
        supervised: (T,) bool, True for tokens that contribute to the loss: every answer and its end token.
        where: `file:line` of the row.
        cut: whether the row was truncated to the length limit; its last answer then has no end token.
    """

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    where: str
    cut: bool = False

    @property
    def num_supervised(self) -> int:
        """Number of labels: supervised tokens except the first id, which no token predicts."""
        return int(self.supervised[1:].sum())
