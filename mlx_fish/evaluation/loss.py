"""`mlx-fish evaluate`: the loss over supervised tokens, the base's beside the tuned model's."""

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
    """Mean loss over all supervised tokens of the batches: a sum divided once, never a mean of means."""
    loss, tokens = 0.0, 0
    for batch in batches:
        loss += backend.evaluate(batch)
        tokens += batch.num_supervised
    return loss / tokens


@dataclass(frozen=True)
class Evaluation:
    """`loss` in nats a supervised token, weighted by tokens; `base` is the same without the adapter, None when there is none."""

    loss: float
    supervised_tokens: int
    rows: int
    base: "Evaluation | None" = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def as_json(self) -> dict[str, Any]:
        return {**self._figures(), "base": self.base._figures() if self.base else None}

    def _figures(self) -> dict[str, float]:
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
    """Evaluate one split of a data set (default: test) as the adapter's run was validated: same rows, same length limit.

    Args:
        data: None: what the run was trained on, else the fish data.

    Raises:
        FishError: the split is unknown or has no rows.
    """
    split = split or "test"
    if split not in (*SPLITS, "all"):
        raise FishError(f"--split {split}: expected one of {', '.join(SPLITS)}, all.")
    place = find_adapter(adapter)
    run = read_run(place) if place else {}
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
