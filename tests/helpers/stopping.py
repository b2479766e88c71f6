"""`python stopping.py SIGNAL STEP ARGUMENTS…`: `mlx-fish ARGUMENTS…`, which gets the signal while it computes update STEP (from 1)."""

import os
import signal
import sys

from mlx_fish.cli import main
from mlx_fish.training import loop

signum, stop_at = signal.Signals[sys.argv[1]], int(sys.argv[2])
real = loop._Loop._update


def update(self, step, batches):
    if step + 1 == stop_at:
        os.kill(os.getpid(), signum)
    return real(self, step, batches)


loop._Loop._update = update
main(sys.argv[3:])
