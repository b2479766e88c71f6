"""Stop cleanly on Ctrl-C, SIGTERM or SIGHUP (a closed terminal): the first signal requests a stop, the second one exits.

Python runs signal handlers only between two bytecode instructions, and a training step may spend seconds inside
a framework. Therefore a separate thread counts the signals: it reads Python's wake-up file descriptor, to which
Python writes as soon as a signal arrives.
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
    """A request to stop by the user or the system.

    Attributes:
        exit_code: the shell's exit code for the signal: 130 (SIGINT), 143 (SIGTERM) or 129 (SIGHUP).
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Stop:
    """A stop request. It interrupts the running code, except inside `deferred`, where the code polls with `check`."""

    def __init__(self) -> None:
        self._signum: int | None = None
        self._is_deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals inside this context; do not raise."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and call `check` before each one."""
        for item in items:
            self.check()
            yield item

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._signum = signum
        if not self._is_deferred:
            raise Interrupted(signum)


@contextmanager
def catching() -> Iterator[Stop]:
    """Route the signals to the yielded `Stop`, and restore the previous handlers on exit.

    Outside the main thread, where Python does not allow signal handlers, the `Stop` never fires.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # Signals that the parent process ignores stay ignored: `nohup` works this way.
    handled = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    old_handlers = {signum: signal.signal(signum, stop._on_signal) for signum in handled}
    old_wakeup_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_exit_on_second_signal, args=(reader,), daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(old_wakeup_fd)
        for signum, handler in old_handlers.items():
            signal.signal(signum, handler)
        writer.close()
        watcher.join()  # the message about the first signal must be complete


def _exit_on_second_signal(reader: socket.socket) -> None:
    """Print a message on the first signal, and exit the process on the second."""
    num_signals = 0
    with reader:
        while data := reader.recv(1):
            if data[0] not in SIGNALS:
                continue
            num_signals += 1
            if num_signals == 2:
                os._exit(128 + data[0])
            # Not `print`: the main thread may be inside a `print` call.
            _write_stderr(b"\n! stopping; press Ctrl-C again to exit immediately\n")


def _write_stderr(text: bytes) -> None:
    with suppress(OSError):  # the reason for the stop may be a closed terminal
        os.write(2, text)
