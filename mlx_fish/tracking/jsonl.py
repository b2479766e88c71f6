"""Write events to `trainer_log.jsonl`: one JSON object per line, with LLaMA-Factory's keys."""

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
    """The sink that writes `trainer_log.jsonl`.

    Its state is saved in every checkpoint: a resumed run truncates the log to the lines that existed at the checkpoint.
    """

    def __init__(self, folder: Path, *, logging_steps: int, state: dict[str, Any] | None = None):
        """Open the log.

        Args:
            folder: the run's output folder.
            logging_steps: updates per line. A line holds the mean loss of its updates; the last update always ends one.
            state: the value that `state` returned when the run was last saved; None for a new run.
        """
        state = state or {}
        self.path = folder / LOG_FILE
        self.logging_steps = logging_steps
        self._total = self._per_epoch = 0
        self._pending_losses: list[float] = list(state.get("pending", []))
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
        """Flush all lines to disk and return the state from which `JsonLog(state=…)` continues."""
        self._flush(sync=True)
        return {"pending": self._pending_losses, "log_lines": self._num_lines}

    def close(self) -> None:
        with suppress(OSError):  # every line was already flushed, or its failure reported
            self._file.close()

    def _update(self, event: Updated) -> None:
        self._pending_losses.append(event.loss)
        if event.step % self.logging_steps and event.step != self._total:
            return
        mean_loss = sum(self._pending_losses) / len(self._pending_losses)
        self._pending_losses = []
        self._write(
            event.step,
            event.elapsed,
            loss=mean_loss,
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
    """Truncate the log to its first `count` lines.

    The file is replaced, not overwritten: if the log is a link, the link's target stays unchanged.

    Returns:
        the number of lines kept, which is less than `count` if the log is shorter.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count] if count else []
    except (OSError, UnicodeDecodeError):
        lines = []
    write_text(path, "".join(lines))
    return len(lines)


def _clock(seconds: float) -> str:
    """Format a duration as H:MM:SS."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
