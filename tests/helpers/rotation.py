"""Long series are tested a part a day, so that every run takes minutes and a week covers them all.

`MLX_FISH_ALL_TESTS=1 make test` tests everything.
"""

import datetime
import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
TODAY = datetime.date.today().toordinal()


def rotating(series: Iterable[T], parts: int) -> list[T]:
    """Today's part of the series: every `parts`-th item, beginning one further each day."""
    items = list(series)
    return items if os.environ.get("MLX_FISH_ALL_TESTS") else items[TODAY % parts :: parts]
