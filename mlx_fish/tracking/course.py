"""The figures of a run so far, which are part of every checkpoint: a resumed run's curves and totals go on from there."""

import time
from typing import Any

from mlx_fish.tracking.events import Updated, Validated, emit


class Course:
    """Losses, tokens and times of a run. `updated` and `validated` note one more figure and send its event.

    Args:
        state: what `state` gave when the run was last saved; None for a new run.
    """

    def __init__(self, state: dict[str, Any] | None = None):
        state = state or {}
        self.losses: list[tuple[int, float]] = [(step, loss) for step, loss in state.get("losses", [])]
        self.eval_losses: list[tuple[int, float]] = [(step, loss) for step, loss in state.get("eval_losses", [])]
        self.tokens: int = state.get("tokens", 0)
        self.training_seconds: float = state.get("training_seconds", 0.0)
        self._started: float = time.monotonic() - state.get("seconds", 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, those before a resume included."""
        return time.monotonic() - self._started

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.training_seconds

    def updated(
        self, step: int, *, loss: float, learning_rate: float, grad_norm: float, tokens: int, seconds: float, peak: int
    ) -> None:
        """After update `step` (from 1) of `tokens` real input tokens in `seconds`, with `peak` bytes held at the most."""
        self.losses.append((step, loss))
        self.tokens += tokens
        self.training_seconds += seconds
        emit(Updated(step, loss, learning_rate, grad_norm, self.tokens, self.tokens_per_second, peak, self.elapsed))

    def validated(self, step: int, loss: float) -> None:
        self.eval_losses.append((step, loss))
        emit(Validated(step, loss, self.elapsed))

    def was_validated(self, step: int) -> bool:
        return any(at == step for at, _ in self.eval_losses)

    def state(self) -> dict[str, Any]:
        """All that `Course(state)` needs to go on."""
        return {
            "losses": self.losses,
            "eval_losses": self.eval_losses,
            "tokens": self.tokens,
            "training_seconds": self.training_seconds,
            "seconds": self.elapsed,
        }
