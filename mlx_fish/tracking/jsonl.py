"""Events as `trainer_log.jsonl`: one JSON object a line, with LLaMA-Factory's keys."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_fish.errors import FishError
from mlx_fish.storage.files import write_text
from mlx_fish.tracking.events import Event, Started, Updated, Validated

LOG_FILE = "trainer_log.jsonl"


class JsonLog:
    """The sink that writes the log, and a part of every checkpoint: a resumed run's log is cut to the lines of that time.

    Args:
        logging_steps: a line every so many updates, with their mean loss, and one after the last.
        state: what `state` gave when the run was last saved; None for a new run.
    """

    def __init__(self, folder: Path, *, logging_steps: int, state: dict[str, Any] | None = None):
        state = state or {}
        self.path = folder / LOG_FILE
        self.logging_steps = logging_steps
        self._total = self._per_epoch = 0
        self._pending: list[float] = list(state.get("pending", []))
        self._num_lines = _keep_lines(self.path, state.get("log_lines", 0))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def take(self, event: Event) -> None:
        match event:
            case Started(total, per_epoch, _):
                self._total, self._per_epoch = total, per_epoch
            case Updated():
                self._update(event)
            case Validated(step, loss, elapsed):
                self._write(step, elapsed, eval_loss=loss)
            case _:
                return

    def state(self) -> dict[str, Any]:
        """All that `JsonLog(state=…)` needs to go on; the lines up to here are on the disk when this returns."""
        self._flush(sync=True)
        return {"pending": self._pending, "log_lines": self._num_lines}

    def close(self) -> None:
        with suppress(OSError):  # each line was flushed already, or its failure reported
            self._file.close()

    def _update(self, event: Updated) -> None:
        self._pending.append(event.loss)
        if event.step % self.logging_steps and event.step != self._total:
            return
        mean = sum(self._pending) / len(self._pending)
        self._pending = []
        self._write(
            event.step,
            event.elapsed,
            loss=mean,
            lr=event.learning_rate,
            grad_norm=event.grad_norm,
            throughput=round(event.tokens_per_second, 2),
            total_tokens=event.total_tokens,
        )

    def _write(self, step: int, elapsed: float, **values: Any) -> None:
        remaining = elapsed / step * (self._total - step) if step else 0.0
        entry = {
            "current_steps": step,
            "total_steps": self._total,
            **values,
            "epoch": round(step / self._per_epoch, 4),
            "percentage": round(100 * step / self._total, 2),
            "elapsed_time": _clock(elapsed),
            "remaining_time": _clock(remaining),
        }
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._num_lines += 1
        self._flush()

    def _flush(self, *, sync: bool = False) -> None:
        try:
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise FishError(f"cannot write {self.path}: {error.strerror or error}.") from error


def _keep_lines(path: Path, count: int) -> int:
    """Cut the log to its first `count` lines; returns how many it really has.

    The file is replaced, so that a log which is a link to another file is not written through.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count] if count else []
    except (OSError, UnicodeDecodeError):
        lines = []
    write_text(path, "".join(lines))
    return len(lines)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
