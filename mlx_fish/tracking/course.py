"""Accumulate the metrics of a run. They are saved in every checkpoint, so a resumed run continues its curves and totals."""

import time
from typing import Any

from mlx_fish.tracking.events import Updated, Validated, emit


class RunMetrics:
    """The losses, tokens and times of a run so far. `updated` and `validated` record new values and emit their events.

    Attributes:
        losses: (step, mean training loss in nats per supervised token) of every update.
        eval_losses: (step, mean validation loss in nats per supervised token) of every validation.
        tokens: input tokens of all updates, without padding.
        training_seconds: time spent in updates.
    """

    def __init__(self, state: dict[str, Any] | None = None):
        """Start from the values that `state` returned when the run was last saved; None for a new run."""
        state = state or {}
        self.losses: list[tuple[int, float]] = [(step, loss) for step, loss in state.get("losses", [])]
        self.eval_losses: list[tuple[int, float]] = [(step, loss) for step, loss in state.get("eval_losses", [])]
        self.tokens: int = state.get("tokens", 0)
        self.training_seconds: float = state.get("training_seconds", 0.0)
        self._started: float = time.monotonic() - state.get("seconds", 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds since the run started, including the time before a resume."""
        return time.monotonic() - self._started

    @property
    def tokens_per_second(self) -> float:
        """Training throughput over all updates so far."""
        return self.tokens / self.training_seconds

    def updated(
        self, step: int, *, loss: float, learning_rate: float, grad_norm: float, tokens: int, seconds: float, peak: int
    ) -> None:
        """Record update number `step`, counted from 1.

        Args:
            loss: mean loss, nats per supervised token.
            tokens: input tokens of the update, without padding.
            seconds: duration of the update.
            peak: peak memory so far, bytes.
        """
        self.losses.append((step, loss))
        self.tokens += tokens
        self.training_seconds += seconds
        emit(Updated(step, loss, learning_rate, grad_norm, self.tokens, self.tokens_per_second, peak, self.elapsed))

    def validated(self, step: int, loss: float) -> None:
        """Record the validation loss after `step` updates, in nats per supervised token."""
        self.eval_losses.append((step, loss))
        emit(Validated(step, loss, self.elapsed))

    def was_validated(self, step: int) -> bool:
        """Return whether the validation after `step` updates was already recorded."""
        return any(eval_step == step for eval_step, _ in self.eval_losses)

    def state(self) -> dict[str, Any]:
        """Return the values to save, from which `RunMetrics(state)` continues."""
        return {
            "losses": self.losses,
            "eval_losses": self.eval_losses,
            "tokens": self.tokens,
            "training_seconds": self.training_seconds,
            "seconds": self.elapsed,
        }
