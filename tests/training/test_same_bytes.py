"""The same seed gives the same bytes, whatever the hash seed, the locale, the folder or other random numbers; and draws from nobody's."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
from numpy_backend import NumpyBackend
from runs import SMALL, log_of, outcome, train, write_rows

pytestmark = pytest.mark.process

# Draws from every generator there is, before the run and in the midst of it, and looks whether the run did.
PROGRAM = """
import random, sys
import numpy as np
import mlx_fish.backends.mlx.runtime
import mlx.core as mx
import torch
from mlx_fish.training import loop
from mlx_fish.cli import main

def draw():
    random.random(), np.random.rand(), mx.random.uniform(), torch.rand(1)

def states():
    mine = [np.array(state).tolist() for state in mx.random.state]
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), mine

for _ in range(int(sys.argv[1])):
    draw()
real = loop._Loop._update
def update(*arguments):
    before = states()
    result = real(*arguments)
    assert states() == before, "an update drew from a global generator"
    draw()
    return result
loop._Loop._update = update
try:
    main(sys.argv[2:])
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def test_the_environment_changes_no_byte(tmp_path, backend_name):
    results = []
    for number, environment in enumerate(
        [
            {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC"},
            {
                "PYTHONHASHSEED": "4242",
                "LC_ALL": "C",
                "TZ": "Asia/Shanghai",
                "PYTHONUTF8": "0",
                "LANG": "zh_CN.GB18030",
            },
        ]
    ):
        folder = tmp_path / f"文件夹 {number}" / "in"
        folder.mkdir(parents=True)
        write_rows(folder / "rows.jsonl")
        arguments = [
            "train",
            "--model",
            "tiny",
            "--data",
            "rows.jsonl",
            "--iters",
            "4",
            "--lora-dropout",
            "0.2",
            "--output-dir",
            "run",
        ]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(5 * number), *arguments],
            cwd=folder, env={**os.environ, **environment}, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
        results.append(outcome(folder / "run"))
    assert results[0] == results[1]


def test_another_seed_gives_other_bytes(tmp_path):
    settings = {**SMALL, "data": str(write_rows(tmp_path / "rows.jsonl"))}
    for seed in (1, 2):
        train(NumpyBackend(), **settings, seed=seed, output_dir=str(tmp_path / str(seed)))
    assert log_of(tmp_path / "1") != log_of(tmp_path / "2")


def test_the_callers_generators_are_left_as_they_were(tmp_path):
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), str(np.random.get_state())
    train(NumpyBackend(), **SMALL, data=str(write_rows(tmp_path / "rows.jsonl")), output_dir=str(tmp_path / "run"))
    assert (random.getstate(), str(np.random.get_state())) == before
