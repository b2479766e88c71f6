"""Evaluate the loss over supervised tokens, for the base and for the tuned model (`mlx-fish evaluate`)."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_fish.backends.protocol import Backend
from mlx_fish.config import TrainConfig
from mlx_fish.data.batches import Batch, evaluation_rows
from mlx_fish.data.dataset import SPLITS, load_dataset
from mlx_fish.data.examples import Mistakes
from mlx_fish.errors import FishError
from mlx_fish.inference.session import load_session
from mlx_fish.objectives import OBJECTIVES
from mlx_fish.planning.job import say_cut
from mlx_fish.runs.folder import find_adapter, read_run
from mlx_fish.runs.record import data_path
from mlx_fish.tracking.events import say


def mean_loss(backend: Backend, batches: Iterable[Batch]) -> float:
    """Return the mean loss over all supervised tokens of the batches, in nats for cross-entropy.

    The summed loss is divided once by the number of tokens: a mean of per-batch means would weight tokens unequally.
    """
    loss_sum, num_tokens = 0.0, 0
    for batch in batches:
        loss_sum += backend.evaluate(batch)
        num_tokens += batch.num_supervised
    return loss_sum / num_tokens


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        loss: mean loss, nats per supervised token.
        supervised_tokens: number of tokens in the mean.
        rows: number of evaluated rows.
        base: the result of the base without the adapter; None if there is no adapter.
    """

    loss: float
    supervised_tokens: int
    rows: int
    base: "Evaluation | None" = None

    @property
    def perplexity(self) -> float:
        """exp(loss), with the loss capped at 700 to avoid overflow."""
        return math.exp(min(self.loss, 700.0))

    def as_json(self) -> dict[str, Any]:
        """Return the result as a JSON-serialisable object."""
        return {**self._metrics(), "base": self.base._metrics() if self.base else None}

    def _metrics(self) -> dict[str, float]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "supervised_tokens": self.supervised_tokens,
            "rows": self.rows,
        }


def evaluate(
    *,
    data: str | None,
    split: str | None,
    model: str | None,
    adapter: Path | None,
    no_adapter: bool,
    backend: str = "auto",
) -> Evaluation:
    """Evaluate a split of a data set, with the objective, template and maximum length of the adapter's training run.

    Args:
        data: data set; None: the training data of the run, or the fish data if there is no run.
        split: `train`, `valid`, `test` or `all`; None: `test`.
        model, adapter, no_adapter, backend: see `load_session`.

    Raises:
        FishError: the split is unknown or has no rows, or rows are broken.
    """
    split = split or "test"
    if split not in (*SPLITS, "all"):
        raise FishError(f"--split {split}: expected one of {', '.join(SPLITS)}, all.")
    adapter_path = find_adapter(adapter)
    run = read_run(adapter_path) if adapter_path else {}
    settings = asdict(TrainConfig()) | run.get("settings", {})
    objective = OBJECTIVES[settings["stage"]]
    dataset = load_dataset(
        data or settings["data"],
        kind=objective.rows,
        skip_bad_rows=settings["skip_bad_rows"],
        found_at=None if data else data_path(run),
    )
    examples = [example for name in SPLITS if split in (name, "all") for example in dataset.splits[name]]
    if not examples:
        raise FishError(f"--data {dataset.name} has no rows in its {split} split; try --split all.")
    session = load_session(model=model, adapter=adapter, no_adapter=no_adapter, backend=backend)
    mistakes = Mistakes()
    rows = objective.tokenise(examples, session.template, settings["max_seq_length"], mistakes)
    if not rows or not settings["skip_bad_rows"]:
        mistakes.refuse()
    say(f"{dataset.name}, {split}: {len(rows)} rows")
    say_cut(rows, settings["max_seq_length"])
    packing = not session.folder.attends_in_windows
    batches = [objective.collate(batch, packing=packing) for batch in evaluation_rows(rows)]
    tokens = sum(batch.num_supervised for batch in batches)
    loaded: Backend = session.load()

    def measure(base: Evaluation | None) -> Evaluation:
        return Evaluation(mean_loss(loaded, batches), tokens, len(rows), base)

    if session.adapter is None:
        return measure(None)
    loaded.use_adapter(False)
    base = measure(None)
    loaded.use_adapter(True)
    return measure(base)
