"""`python stopping.py SIGNAL STEP ARGUMENTS…`: `mlx-fish ARGUMENTS…`, which gets the signal while it computes update STEP (from 1)."""

import os
import signal
import sys

from mlx_fish import train as room
from mlx_fish.cli import main

signum, stop_at = signal.Signals[sys.argv[1]], int(sys.argv[2])
real = room._update


def update(job, backend, report, step, batches):
    if step + 1 == stop_at:
        os.kill(os.getpid(), signum)
    return real(job, backend, report, step, batches)


room._update = update
main(sys.argv[3:])
