"""Ctrl-C, SIGTERM and a closed terminal: the first asks to stop, a second one ends the process at once.

Python runs a signal's handler only between two of its own instructions, and a step may take seconds inside a framework. So the
signals are counted by a thread that reads Python's wake-up channel, which is written the moment a signal arrives.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

# Windows has no SIGHUP
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """The person or the system asked to stop. `exit_code` is what a shell reports for the signal: 130, 143 or 129."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Stop:
    """A wish to stop. It interrupts whatever runs, except inside `deferred`, where the work asks for it at places it chooses."""

    def __init__(self) -> None:
        self._signum: int | None = None
        self._is_deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While this lasts a signal only sets the wish."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """The items, with a check before each."""
        for item in items:
            self.check()
            yield item

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._signum = signum
        if not self._is_deferred:
            raise Interrupted(signum)


@contextmanager
def catching() -> Iterator[Stop]:
    """Turn the signals into the `Stop` that is yielded, and put the earlier handlers back afterwards.

    Outside the main thread, where Python allows no handlers, it never stops anything.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # What was ignored from outside stays ignored: `nohup` works this way.
    taken = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    old_handlers = {signum: signal.signal(signum, stop._on_signal) for signum in taken}
    old_channel = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_end_at_the_second, args=(reader,), daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(old_channel)
        for signum, handler in old_handlers.items():
            signal.signal(signum, handler)
        writer.close()
        watcher.join()  # it has said what it had to say


def _end_at_the_second(reader: socket.socket) -> None:
    came = 0
    with reader:
        while data := reader.recv(1):
            if data[0] not in SIGNALS:
                continue
            came += 1
            if came == 2:
                os._exit(128 + data[0])
            # Not `print`: the main thread may be in the midst of one.
            _tell(b"\n! stopping; once more to stop at once\n")


def _tell(text: bytes) -> None:
    with suppress(OSError):  # a closed terminal may be why we are stopping
        os.write(2, text)
