"""Define the events of a run and send them to sinks. To add a logger, write a sink.

`say` emits a message for the user; the training loop emits the other events. By default, events go to the terminal.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Message:
    """A message for the user."""

    text: str


@dataclass(frozen=True)
class Started:
    """A run starts or resumes.

    Attributes:
        total: number of updates of the whole run.
        per_epoch: updates per epoch.
        step: updates already done, in a resumed run.
    """

    total: int
    per_epoch: int
    step: int


@dataclass(frozen=True)
class Updated:
    """An optimizer update is complete.

    Attributes:
        step: number of the update, from 1.
        loss: mean loss, nats per supervised token.
        learning_rate: learning rate of the update.
        grad_norm: global L2 norm of the gradient before clipping.
        total_tokens: input tokens of all updates so far, without padding.
        tokens_per_second: throughput over all updates so far.
        peak_bytes: peak memory so far.
        elapsed: seconds since the run started, including the time before a resume.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    total_tokens: int
    tokens_per_second: float
    peak_bytes: int
    elapsed: float


@dataclass(frozen=True)
class Validated:
    """The mean loss on the validation rows after `step` updates, in nats per supervised token."""

    step: int
    loss: float
    elapsed: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint after `step` updates was saved to `path`."""

    step: int
    path: Path


@dataclass(frozen=True)
class Stopped:
    """A run was interrupted or failed after `step` of `total` updates."""

    step: int
    total: int


@dataclass(frozen=True)
class Sampled:
    """The answers to a sample question before and after training."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class Finished:
    """A run is complete. `peak_bytes` is its peak memory, `seconds` its duration."""

    output: Path
    tokens_per_second: float
    peak_bytes: int
    seconds: float


Event = Message | Started | Updated | Validated | Saved | Stopped | Sampled | Finished


class Sink(Protocol):
    """A receiver of events."""

    def take(self, event: Event) -> None:
        """Handle an event. Ignore the types that do not concern this sink."""
        ...


_sinks: ContextVar[tuple[Sink, ...] | None] = ContextVar("sinks", default=None)


def emit(event: Event) -> None:
    """Send an event to all active sinks."""
    for sink in active_sinks():
        sink.take(event)


def say(text: str = "") -> None:
    """Emit a message for the user. The terminal prints it to stderr: stdout is reserved for answers."""
    emit(Message(text))


def active_sinks() -> tuple[Sink, ...]:
    """Return the sinks that receive events now."""
    from mlx_fish.tracking.terminal import TERMINAL

    sinks = _sinks.get()
    return (TERMINAL,) if sinks is None else sinks


@contextmanager
def sinks_added(*more: Sink) -> Iterator[None]:
    """Send events to these sinks too, inside this context."""
    token = _sinks.set((*active_sinks(), *more))
    try:
        yield
    finally:
        _sinks.reset(token)
