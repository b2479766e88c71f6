"""Define the interface of a training objective.

A backend computes the log-probability of every supervised token of a batch, and the gradient of a scalar loss of these
log-probabilities with respect to the adapter. An objective defines everything else, as plain functions: how a row of a
dataset is read, which of its tokens are supervised, how rows are collated into a batch, and which loss is minimised.

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
    """The N labels of a batch as a loss function sees them, in arrays of the backend's framework.

    Attributes:
        weights: (N,) float32, the weight of each label in the loss: 1 / (number of labels in the whole update) in
            training, 1 in evaluation, 0 for padding. A loss that is a sum over labels multiplies by it.
        owners: (N,) int32, the index of the batch's row to which each label belongs.
    """

    weights: Any
    owners: Any


class LossFunction(Protocol):
    """A loss: log-probabilities of the labels, (N,) float32 -> scalar.

    It uses only operations that MLX arrays and torch tensors share. All labels of a row are in the same call.
    """

    def __call__(self, log_probs: Any, labels: Labels) -> Any: ...


class Tokenise(Protocol):
    """Tokenise examples into rows of at most `max_length` ids. Unusable examples are added to `mistakes`."""

    def __call__(
        self, examples: Sequence[Example], template: Template, max_length: int, mistakes: Mistakes
    ) -> list[Tokens]: ...


class Collate(Protocol):
    """Collate rows into a packed or padded batch with the sizes of `capacity`; None: the sizes that the rows need."""

    def __call__(self, rows: Sequence[Tokens], *, packing: bool = ..., capacity: Capacity | None = ...) -> Batch: ...


@dataclass(frozen=True)
class Objective:
    """A training objective, selected with `--stage`.

    Attributes:
        name: value of `--stage`.
        rows: the kind of a dataset row: conversation or document.
        opening: returns the turns of an example that prompt a sample answer.
        tokenise: converts examples into rows of token ids.
        collate: builds a batch from rows.
        loss: the loss to minimise.
        template: the prompt template that the objective requires; None: the one selected with `--template`.
    """

    name: str
    rows: RowKind
    opening: Callable[[Example], tuple[Turn, ...]]
    tokenise: Tokenise
    collate: Collate
    loss: LossFunction
    template: str | None = None


def negative_log_likelihood(log_probs: Any, labels: Labels) -> Any:
    """Return the weighted sum of -log p over the labels: the cross-entropy, nats."""
    return -(log_probs * labels.weights).sum()
