"""A bound on the time of work that may never end, such as a stranger's chat template. Knows nothing of the work."""

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


def within(work: Callable[[], T]) -> T:
    """The result of `work`, or what it raises.

    Raises:
        TimeoutError: it did not end within `SECONDS`. Its thread cannot be ended, and is left to end with the process.
    """
    results: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            results.put((work(), None))
        except BaseException as error:  # handed over to the thread that waits
            results.put((None, error))

    faulthandler.dump_traceback_later(HARD_SECONDS, exit=True, file=2)
    try:
        threading.Thread(target=run, daemon=True).start()
        result, error = results.get(timeout=SECONDS)
    except queue.Empty:
        raise TimeoutError(f"it did not end within {SECONDS:g} seconds") from None
    finally:
        faulthandler.cancel_dump_traceback_later()
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]
