"""One stream of events -> the terminal (stderr), `trainer_log.jsonl` and the picture of the run.

The log has LLaMA-Factory's keys, one JSON object a line. Knows nothing of models.
"""

import io
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_fish.errors import FishError
from mlx_fish.files import write_bytes, write_text

LOG_FILE = "trainer_log.jsonl"
PICTURE = "training_loss.png"


def say(text: str = "") -> None:
    """A line for the person, on stderr: stdout is for answers."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # a closed terminal or a full disk behind `2>` is no reason to lose a run
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)


class Report:
    """Follows a run of `total` updates. Call `update` after each one and `validated` after each validation.

    Args:
        step: the updates done already, in a run that is resumed.
        state: what `state` gave after that step; the log goes on from there, whatever was written to it later.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total: int,
        per_epoch: int,
        logging_steps: int,
        step: int = 0,
        state: dict[str, Any] | None = None,
    ):
        from tqdm import tqdm

        state = state or {}

        self.folder = folder
        self.total = total
        self.per_epoch = per_epoch
        self.logging_steps = logging_steps
        self.losses: list[tuple[int, float]] = [(at, loss) for at, loss in state.get("losses", [])]
        self.eval_losses: list[tuple[int, float]] = [(at, loss) for at, loss in state.get("eval_losses", [])]
        self.started = time.monotonic() - state.get("seconds", 0.0)
        self.training_seconds: float = state.get("training_seconds", 0.0)
        self.tokens: int = state.get("tokens", 0)
        self._pending: list[float] = list(state.get("pending", []))
        self._log_lines = _keep_lines(folder / LOG_FILE, state.get("log_lines", 0))
        self._log = open(folder / LOG_FILE, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=step,
            file=sys.stderr,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not self._interactive,
            bar_format="{desc}{percentage:3.0f}%|{bar:16}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def update(
        self, step: int, *, loss: float, learning_rate: float, grad_norm: float, tokens: int, seconds: float, peak: int
    ) -> None:
        """After update `step` (from 1): `tokens` real input tokens in `seconds`, `peak` bytes held at the most."""
        self.losses.append((step, loss))
        self._pending.append(loss)
        self.tokens += tokens
        self.training_seconds += seconds
        rate = self.tokens / self.training_seconds
        figures = f"loss {loss:.3f}  lr {learning_rate:.1e}  {rate:.0f} tok/s  peak {peak / 1e9:.2f} GB"
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update()
        if not self._interactive and (step == self.total or step % max(1, self.total // 10) == 0):
            say(f"  {step:>5}/{self.total}  {figures}")  # a file or a pipe gets ten lines, not a redrawn bar
        if step % self.logging_steps == 0 or step == self.total:
            mean = sum(self._pending) / len(self._pending)
            self._pending = []
            self._write(
                step,
                loss=mean,
                lr=learning_rate,
                grad_norm=grad_norm,
                throughput=round(rate, 2),
                total_tokens=self.tokens,
            )

    def validated(self, step: int, loss: float) -> None:
        self.eval_losses.append((step, loss))
        self._write(step, eval_loss=loss)

    def was_validated(self, step: int) -> bool:
        return any(at == step for at, _ in self.eval_losses)

    def state(self) -> dict[str, Any]:
        """All that a resumed run's `Report` needs to go on; the log's lines up to here are on the disk when this returns."""
        self._flush(sync=True)
        return {
            "losses": self.losses,
            "eval_losses": self.eval_losses,
            "pending": self._pending,
            "tokens": self.tokens,
            "training_seconds": self.training_seconds,
            "seconds": time.monotonic() - self.started,
            "log_lines": self._log_lines,
        }

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._interactive:
            with suppress(OSError):  # the terminal may have been closed
                self._bar.write(text, file=sys.stderr)
        else:
            say(text)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        with suppress(OSError):  # each line was flushed already, or reported
            self._log.close()

    def _write(self, step: int, **values: Any) -> None:
        elapsed = time.monotonic() - self.started
        remaining = elapsed / step * (self.total - step) if step else 0.0
        entry = {
            "current_steps": step,
            "total_steps": self.total,
            **values,
            "epoch": round(step / self.per_epoch, 4),
            "percentage": round(100 * step / self.total, 2),
            "elapsed_time": _clock(elapsed),
            "remaining_time": _clock(remaining),
        }
        self._log.write(json.dumps(entry, allow_nan=False) + "\n")
        self._log_lines += 1
        self._flush()

    def _flush(self, *, sync: bool = False) -> None:
        try:
            self._log.flush()
            if sync:
                os.fsync(self._log.fileno())
        except OSError as error:
            raise FishError(f"cannot write {self.folder / LOG_FILE}: {error.strerror or error}.") from error


def _keep_lines(path: Path, count: int) -> int:
    """Cut the log to its first `count` lines; returns how many it really has.

    Written anew, so that a log which is a link to another file is replaced and not written through.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count] if count else []
    except (OSError, UnicodeDecodeError):
        lines = []
    write_text(path, "".join(lines))
    return len(lines)


def draw(folder: Path, losses: list[tuple[int, float]], eval_losses: list[tuple[int, float]]) -> Path:
    """Save the loss curve as `training_loss.png`: each update, a running mean, and the validations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=140, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    steps = [step for step, _ in losses]
    values = [loss for _, loss in losses]
    few = len(steps) <= 20
    axes.plot(
        steps,
        values,
        color="#9ecae1",
        linewidth=1,
        marker="o" if few else None,
        markersize=3,
        label="training, each update",
    )
    if not few:
        axes.plot(
            steps,
            _running_mean(values, max(5, len(values) // 20)),
            color="#2171b5",
            linewidth=2,
            label="training, running mean",
        )
    if eval_losses:
        axes.plot(*zip(*eval_losses, strict=True), color="#d94801", marker="o", linewidth=1.5, label="validation")
        for step, loss in (eval_losses[0], eval_losses[-1]):
            axes.annotate(
                f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="optimizer updates", ylabel="loss (nats a token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_bytes(folder / PICTURE, picture.getvalue())
    return folder / PICTURE


def _running_mean(values: list[float], width: int) -> list[float]:
    means = []
    for at in range(len(values)):
        near = values[max(0, at - width + 1) : at + 1]
        means.append(sum(near) / len(near))
    return means


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class byte_bar:  # noqa: N801 (used like a function)
    """`with byte_bar("fusing") as progress: … progress(done, total)`: a bar on stderr."""

    def __init__(self, title: str):
        self.title = title

    def __enter__(self) -> Callable[[int, int], None]:
        from tqdm import tqdm

        self.bar = tqdm(
            desc=self.title, unit="B", unit_scale=True, file=sys.stderr, leave=False, mininterval=0.2, disable=None
        )
        return self._progress

    def _progress(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def size_text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
