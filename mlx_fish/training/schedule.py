"""The learning rate of each update: linear warm-up, then linear, cosine or constant. A function of the step alone."""

import math


def learning_rate(step: int, *, peak: float, total: int, warmup: int, schedule: str) -> float:
    """The rate for update `step` (from 0) of `total`.

    The first update already learns (a warm-up of n gives peak / n first, not 0), and the last one still does.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    assert schedule == "cosine", schedule
    return peak * 0.5 * (1 + math.cos(math.pi * done))
