"""Compute the learning rate of each update: linear warm-up, then a linear, cosine or constant schedule.

The rate is a function of the step alone, so a resumed run needs no scheduler state.
"""

import math


def learning_rate(step: int, *, peak: float, total: int, warmup: int, schedule: str) -> float:
    """Return the learning rate of update `step`, from 0, of `total`.

    The rate is never 0: a warm-up over n updates starts at peak / n, and the decay would reach 0 only at step
    `total`, after the last update.

    Args:
        peak: learning rate at the end of the warm-up.
        warmup: number of warm-up updates.
        schedule: `linear`, `cosine` or `constant`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    assert schedule == "cosine", schedule
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
