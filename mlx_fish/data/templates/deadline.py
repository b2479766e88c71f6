"""Run untrusted work that may not terminate, such as rendering a model's chat template, with a time limit."""

import ctypes
import faulthandler
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

SECONDS = 5.0
# A single Python instruction, such as 9 ** 9 ** 9, can hold the GIL for hours, so that no other Python thread
# runs. In that case faulthandler's watchdog thread, which does not need the GIL, prints a traceback and ends
# the process.
HARD_SECONDS = 10.0
T = TypeVar("T")
_timer_lock = threading.Lock()  # faulthandler has only one timer per process


def within(work: Callable[[], T]) -> T:
    """Run `work` with a time limit of `SECONDS`; return its result or raise its exception.

    If `work` holds the GIL for `HARD_SECONDS`, the process is ended.

    Raises:
        TimeoutError: `work` did not end in time. It is stopped at the next Python instruction that it executes.
    """
    with _timer_lock:
        return _run_with_timeout(work)


def _run_with_timeout(work: Callable[[], T]) -> T:
    results: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            results.put((work(), None))
        except BaseException as error:  # raised again by the waiting thread
            results.put((None, error))

    thread = threading.Thread(target=run, daemon=True)
    faulthandler.dump_traceback_later(HARD_SECONDS, exit=True, file=2)
    try:
        thread.start()
        result, error = results.get(timeout=SECONDS)
    except queue.Empty:
        # Without this, the thread would keep running and take CPU time from the rest of the process.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TimeoutError(f"it did not end within {SECONDS:g} seconds") from None
    finally:
        faulthandler.cancel_dump_traceback_later()
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]
