"""Errors for people. Mistakes of our own stay `assert`."""

from collections.abc import Iterable
from difflib import get_close_matches


class FishError(Exception):
    """A mistake that the person can mend: one sentence on what is wrong, what was expected, what to do.

    The command line prints the message alone on stderr and exits with 1; `--debug` shows the traceback.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean `qwen`?` when something known is near, else an empty string."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean `{near[0]}`?" if near else ""
