"""A bound on the time of work that may never end, such as a stranger's chat template. Knows nothing of the work."""

import ctypes
import faulthandler
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

SECONDS = 5.0
# One instruction of Python, such as 9 ** 9 ** 9, can hold the interpreter for hours, and no thread of Python gets a turn. Then
# faulthandler's own thread, which needs none, ends the process and says where it was.
HARD_SECONDS = 10.0
T = TypeVar("T")
_turn = threading.Lock()  # faulthandler has one timer for the whole process


def within(work: Callable[[], T]) -> T:
    """The result of `work`, or what it raises.

    Raises:
        TimeoutError: it did not end within `SECONDS`; then it is ended at the next instruction of Python that it reaches.
    """
    with _turn:
        return _within(work)


def _within(work: Callable[[], T]) -> T:
    results: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            results.put((work(), None))
        except BaseException as error:  # handed over to the thread that waits
            results.put((None, error))

    thread = threading.Thread(target=run, daemon=True)
    faulthandler.dump_traceback_later(HARD_SECONDS, exit=True, file=2)
    try:
        thread.start()
        result, error = results.get(timeout=SECONDS)
    except queue.Empty:
        # Left alone it would go on taking turns from every other thread of the process.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TimeoutError(f"it did not end within {SECONDS:g} seconds") from None
    finally:
        faulthandler.cancel_dump_traceback_later()
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]
