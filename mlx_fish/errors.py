"""Errors for the user. Internal errors of this package are `assert`s."""

from collections.abc import Iterable
from difflib import get_close_matches


class FishError(Exception):
    """An error that the user can fix. The message is one sentence: what is wrong, what was expected, what to do.

    The command line prints only the message on stderr and exits with code 1; `--debug` shows the traceback.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a suggestion such as ` Did you mean `qwen`?` if a known word is similar, else an empty string."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean `{matches[0]}`?" if matches else ""
