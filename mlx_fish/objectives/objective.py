"""The protocol between the loop, the backends and what is minimised.

A backend computes the log-probability of every labelled token of a batch, and carries the gradient of a scalar made of them
back to the adapter. An objective decides everything else, in plain functions: how a row of a data set is read, which of its
tokens are labels, how rows lie in a batch, and which scalar is minimised.

    row --rows--> turns --tokenise--> Tokens --collate--> Batch --backend--> log-probabilities --loss--> scalar
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from mlx_fish.data.batches import Batch, Capacity
from mlx_fish.data.examples import Example, Mistakes, RowKind, Turn
from mlx_fish.data.templates.template import Template
from mlx_fish.data.tokens import Tokens


class Labels(NamedTuple):
    """What a loss knows of the N labels of a batch, as arrays of the framework that computes.

    Attributes:
        weights: (N,) float32, the share of each label in the loss: 1 / (labels of the whole update), 1 in an evaluation,
            0 for a slot that only fills the batch up. A loss that is a sum over labels multiplies by it.
        owners: (N,) int32, the row of the batch to which each label belongs.
    """

    weights: Any
    owners: Any


class LossFunction(Protocol):
    """Log-probabilities (N,) float32 of the labelled tokens -> the scalar to minimise, in the operations that arrays of MLX
    and torch have in common. All labels of a row come in one call."""

    def __call__(self, log_probs: Any, labels: Labels) -> Any: ...


class Tokenise(Protocol):
    """Examples -> rows of tokens, at most `max_length` ids each; rows that cannot be taken are added to `mistakes`."""

    def __call__(
        self, examples: Sequence[Example], template: Template, max_length: int, mistakes: Mistakes
    ) -> list[Tokens]: ...


class Collate(Protocol):
    """Rows -> a batch, laid end to end when `packing`, filled up to `capacity` (None: to what the rows need)."""

    def __call__(self, rows: Sequence[Tokens], *, packing: bool = ..., capacity: Capacity | None = ...) -> Batch: ...


@dataclass(frozen=True)
class Objective:
    """One way of training, by the name that `--stage` gives it.

    Attributes:
        rows: what a row of the data set is.
        opening: the turns of an example that a sample answer goes on from.
        template: the prompt template that it needs; None: the one that `--template` names.
    """

    name: str
    rows: RowKind
    opening: Callable[[Example], tuple[Turn, ...]]
    tokenise: Tokenise
    collate: Collate
    loss: LossFunction
    template: str | None = None


def negative_log_likelihood(log_probs: Any, labels: Labels) -> Any:
    """The weighted sum of -log p over the labels: cross-entropy in nats."""
    return -(log_probs * labels.weights).sum()
