"""Ctrl-C, SIGTERM, SIGHUP: the step is finished, a checkpoint written, the way on printed. A second one ends the process at once."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from numpy_backend import NumpyBackend
from runs import SMALL, in_child, outcome, resume, train, write_rows

from mlx_fish.config import TrainConfig
from mlx_fish.runs.checkpoint import checkpoints, damage
from mlx_fish.runs.folder import read_run
from mlx_fish.signals import Interrupted, catching
from mlx_fish.training import train as training

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True, scope="module")
def two_batches_a_validation():
    """The few rows would fit into one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mlx_fish.training.loop.evaluation_rows", lambda rows: [rows[i : i + 2] for i in range(0, len(rows), 2)]
        )
        yield


@pytest.fixture
def settings(tmp_path):
    return {**SMALL, "data": str(write_rows(tmp_path / "rows.jsonl", 60)), "output_dir": str(tmp_path / "run")}


@pytest.fixture
def expected(settings, tmp_path):
    assert in_child(lambda: train(NumpyBackend(), **{**settings, "output_dir": str(tmp_path / "whole")})) == 0
    return outcome(tmp_path / "whole")


def goes_on(settings, expected):
    assert in_child(lambda: resume(NumpyBackend(), output_dir=settings["output_dir"])) == 0
    assert outcome(Path(settings["output_dir"])) == expected


def names(settings):
    return [path.name[-1] for path in checkpoints(Path(settings["output_dir"]) / "checkpoints")]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_step_is_finished_and_the_way_on_printed(settings, expected, tmp_path, signum, code):
    backend = NumpyBackend()
    backend.during_step = lambda step: os.kill(os.getpid(), signum) if step == 3 else None
    assert in_child(lambda: train(backend, **settings), tmp_path / "stderr") == code
    errors = (tmp_path / "stderr").read_text()
    assert "! stopping; press Ctrl-C again to exit immediately" in errors
    assert "! stopped after 3 of 6 updates" in errors
    assert f"mlx-fish train --resume --output-dir {settings['output_dir']}" in errors
    assert "Traceback" not in errors
    assert names(settings) == ["2", "3"]
    goes_on(settings, expected)


def test_a_second_signal_ends_at_once(settings, expected):
    def twice(step):
        if step == 5:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
            time.sleep(60)

    backend = NumpyBackend()
    backend.during_step = twice
    started = time.monotonic()
    assert in_child(lambda: train(backend, **settings)) == 130
    assert time.monotonic() - started < 50
    assert names(settings) == ["2", "4"]
    assert all(damage(path) is None for path in checkpoints(Path(settings["output_dir"]) / "checkpoints"))
    goes_on(settings, expected)


@pytest.mark.parametrize(
    "validation", [1, 2, 3], ids=["before the first update", "in the middle", "after the last update"]
)
def test_during_validation(settings, expected, validation):
    """The validation is given up at once, and made up for when the run goes on: the log shows no difference."""
    backend = NumpyBackend()
    calls = []

    def second_batch():
        calls.append(len(calls))
        if len(calls) == 2 * validation:
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(calls) <= 2 * validation, "it went on validating"

    backend.during_evaluate = second_batch
    assert in_child(lambda: train(backend, **settings)) == 143
    assert names(settings) == [[], ["2", "3"], ["4", "6"]][validation - 1]
    goes_on(settings, expected)


def test_while_loading_nothing_is_written(settings, monkeypatch, tmp_path):
    def load(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    def child():
        training.load_backend = load
        training.train(TrainConfig(**settings))

    assert in_child(child, tmp_path / "stderr") == 130
    assert not Path(settings["output_dir"]).exists()
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_while_loading_to_go_on(settings, expected):
    backend = NumpyBackend()
    backend.during_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None
    assert in_child(lambda: train(backend, **settings)) == 130
    again = NumpyBackend()
    again.attach = lambda spec, arrays, **rest: os.kill(os.getpid(), signal.SIGTERM)
    assert in_child(lambda: resume(again, output_dir=settings["output_dir"])) == 143
    goes_on(settings, expected)


def test_while_closing(settings, expected):
    """The updates are done and saved; going on only closes the run."""
    backend = NumpyBackend()
    answers = []

    def answer(prompt, sampling, end_ids):
        answers.append(prompt)
        if len(answers) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return iter(prompt[:4])

    backend.generate = answer
    assert in_child(lambda: train(backend, **settings)) == 143
    assert not read_run(Path(settings["output_dir"]))["results"]
    goes_on(settings, expected)
    assert read_run(Path(settings["output_dir"]))["results"]["after"]


def test_what_was_ignored_stays_ignored(settings, expected):
    """`nohup` ignores SIGHUP before it starts a program."""
    backend = NumpyBackend()
    backend.during_step = lambda step: os.kill(os.getpid(), signal.SIGHUP)

    def child():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        train(backend, **settings)

    assert in_child(child) == 0
    assert outcome(Path(settings["output_dir"])) == expected


def test_the_callers_handlers_come_back():
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(Interrupted), catching():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_another_thread_may_train():
    """Python lets only the main thread take signals; elsewhere nothing is taken, and nothing fails."""
    result = []

    def work():
        with catching() as stop:
            stop.check()
            result.extend(stop.between([1, 2]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert result == [1, 2]
