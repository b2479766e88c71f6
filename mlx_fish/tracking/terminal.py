"""Show events on stderr: messages, and a progress bar during training.

If stderr is a pipe or a file, about ten lines replace the bar.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mlx_fish.tracking.events import Event, Finished, Message, Sampled, Started, Stopped, Updated, Validated

_BAR = "{desc}{percentage:3.0f}%|{bar:16}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


class Terminal:
    """The sink that prints to stderr."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._total = 0

    def take(self, event: Event) -> None:
        match event:
            case Message(text):
                self._line(text)
            case Started(total, _, step):
                self._begin(total, step)
            case Updated():
                self._update(event)
            case Validated(step, loss):
                self._line(f"  validation  {loss:.4f} {f'after step {step}' if step else 'before training'}")
            case Stopped(step, total):
                self._line(f"! stopped after {step} of {total} updates")
                self._end()
            case Sampled(question, before, after):
                self._line(f"\n  {question}\n  before: {before}\n  after:  {after}\n")
            case Finished(output, rate, peak, seconds):
                self._line(f"  {rate:.0f} tokens/s, peak {peak / 1e9:.2f} GB, {seconds:.0f} s; saved in {output}/")
            case _:
                return

    def _begin(self, total: int, step: int) -> None:
        from tqdm import tqdm

        self._total = total
        self._end()
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                initial=step,
                file=sys.stderr,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5,
                bar_format=_BAR,
            )

    def _update(self, event: Updated) -> None:
        metrics = (
            f"loss {event.loss:.3f}  lr {event.learning_rate:.1e}  {event.tokens_per_second:.0f} tok/s  "
            f"peak {event.peak_bytes / 1e9:.2f} GB"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(metrics, refresh=False)
            self._bar.update()
        elif event.step == self._total or event.step % max(1, self._total // 10) == 0:
            self._line(f"  {event.step:>5}/{self._total}  {metrics}")
        if event.step == self._total:
            self._end()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._bar is not None:
            with suppress(OSError):  # the terminal may have been closed
                self._bar.write(text, file=sys.stderr)
            return
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:  # a closed terminal, or a full disk behind `2>`, must not end the run
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)


TERMINAL = Terminal()


class byte_bar:  # noqa: N801 (used like a function)
    """A progress bar in bytes on stderr.

    with byte_bar("fusing") as progress:
        progress(done, total)  # bytes
    """

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
    """Format a size in bytes: 1981000000 -> `1.98 GB`."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
