"""One stream of events from everything that runs, to the sinks that listen. A new logger is one more sink.

`say` sends a line for the person; the training loop sends the rest. Without a sink of their own, events go to the terminal.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Message:
    """A line for the person."""

    text: str


@dataclass(frozen=True)
class Started:
    """A run of `total` updates begins, `step` of them done already; an epoch has `per_epoch`."""

    total: int
    per_epoch: int
    step: int


@dataclass(frozen=True)
class Updated:
    """An optimizer update was made.

    Attributes:
        step: its number, from 1.
        loss: nats a supervised token.
        total_tokens: real input tokens of all updates so far.
        tokens_per_second: over all updates so far.
        peak_bytes: the most memory held so far.
        elapsed: seconds since the run began, those before a resume included.
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
    """The mean loss on the validation rows after `step` updates."""

    step: int
    loss: float
    elapsed: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint of `step` updates is complete."""

    step: int
    path: Path


@dataclass(frozen=True)
class Stopped:
    """A run was interrupted, or failed, after `step` of `total` updates."""

    step: int
    total: int


@dataclass(frozen=True)
class Sampled:
    """The answer to one question before training and after it."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class Finished:
    """All updates are done, and everything is written to `output`."""

    output: Path
    tokens_per_second: float
    peak_bytes: int
    seconds: float


Event = Message | Started | Updated | Validated | Saved | Stopped | Sampled | Finished


class Sink(Protocol):
    """Takes every event, and does with it what it is there for."""

    def take(self, event: Event) -> None: ...


_sinks: ContextVar[tuple[Sink, ...] | None] = ContextVar("sinks", default=None)


def emit(event: Event) -> None:
    """Send an event to the sinks that listen."""
    for sink in listening():
        sink.take(event)


def say(text: str = "") -> None:
    """Send a line for the person: on the terminal it goes to stderr, since stdout is for answers."""
    emit(Message(text))


def listening() -> tuple[Sink, ...]:
    """The sinks that take events now."""
    from mlx_fish.tracking.terminal import TERMINAL

    sinks = _sinks.get()
    return (TERMINAL,) if sinks is None else sinks


@contextmanager
def sinks_added(*more: Sink) -> Iterator[None]:
    """Within the block, these sinks listen too."""
    token = _sinks.set((*listening(), *more))
    try:
        yield
    finally:
        _sinks.reset(token)
