"""A tokenised row: ids, and which of them are labels. Knows nothing of text."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Tokens:
    """A tokenised conversation.

    Attributes:
        ids: (T,) int32.
        supervised: (T,) bool, True where the id is learnt: every answer and its end token.
        where: `file:line` of the row.
        cut: the row was longer than the limit; its last answer has no end token here.
    """

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    where: str
    cut: bool = False

    @property
    def num_supervised(self) -> int:
        """Supervised tokens that some token predicts (the first id has no predecessor)."""
        return int(self.supervised[1:].sum())
