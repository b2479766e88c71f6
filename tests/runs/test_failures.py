"""What can go wrong in the middle of a run: numbers that are not finite, memory, a full disk, no permission. Nothing saved is lost."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from numpy_backend import NumpyBackend
from runs import SMALL, in_child, log_of, outcome, resume, train, write_rows

from mlx_fish.adapters.peft import load_adapter
from mlx_fish.adapters.spec import initial_arrays
from mlx_fish.backends.choose import load_backend
from mlx_fish.config import TrainConfig
from mlx_fish.errors import FishError
from mlx_fish.planning.job import make_job
from mlx_fish.runs import folder as run_folder
from mlx_fish.runs.checkpoint import checkpoints
from mlx_fish.storage.files import write_bytes
from mlx_fish.storage.tensors import write_safetensors

pytestmark = pytest.mark.process


@pytest.fixture
def settings(tmp_path):
    return {**SMALL, "data": str(write_rows(tmp_path / "rows.jsonl")), "output_dir": str(tmp_path / "run")}


def names(settings):
    return [path.name[-1] for path in checkpoints(Path(settings["output_dir"]) / "checkpoints")]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(settings, bad):
    """It names the step, the rows, and the checkpoint to go back to: not the one whose adapter gave that loss."""
    backend = NumpyBackend()
    backend.loss = lambda value: bad if backend._step == 5 else value
    with pytest.raises(FishError) as error:
        train(backend, **settings)
    message = str(error.value)
    assert message.startswith(f"step 5: the loss ({bad}) or the gradient norm (1.0) is not finite")
    assert message.count("rows.jsonl:") == 4  # an update's rows
    assert message.endswith(f"The last valid checkpoint is {settings['output_dir']}/checkpoints/step-00000002.")
    assert names(settings) == ["2", "4"]
    log_of(Path(settings["output_dir"]))  # every line is JSON
    load_adapter(Path(settings["output_dir"]))


def test_before_any_checkpoint(settings):
    backend = NumpyBackend()
    backend.loss = lambda value: float("nan")
    with pytest.raises(FishError, match="There is no valid checkpoint yet"):
        train(backend, **settings)
    assert names(settings) == []
    assert not (Path(settings["output_dir"]) / "adapter_model.safetensors").exists()


def test_the_real_backend_stops_before_the_update(tmp_path, backend_name):
    """A learning rate that throws the adapter out of float32's range."""
    settings = {**SMALL, "data": str(write_rows(tmp_path / "rows.jsonl")), "output_dir": str(tmp_path / "run")}
    from mlx_fish.training.train import train as run

    with pytest.raises(FishError, match="is not finite") as error:
        run(
            TrainConfig(
                **{**settings, "learning_rate": 1e30, "save_every": 1, "eval_every": None, "lora_target": "all"}
            )
        )
    assert "rows.jsonl:" in str(error.value)
    for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_validation_that_is_not_finite(settings):
    backend = NumpyBackend()
    backend.evaluate = lambda batch: float("nan") if backend._step == 3 else 1.0
    with pytest.raises(FishError, match="validation loss after step 3 is nan(.|\n)*step-00000002.$"):
        train(backend, **settings)
    log_of(Path(settings["output_dir"]))


def test_the_writer_refuses_numbers_that_are_not_finite(tmp_path):
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(FishError, match="b is not finite"):
            write_safetensors(tmp_path / "x", {"a": np.ones(2, np.float32), "b": np.array([1, bad], np.float32)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[malloc] Unable to allocate 99 bytes."),
        RuntimeError("MPS backend out of memory"),
        RuntimeError(
            "[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum allowed buffer size"
        ),
    ],
)
def test_out_of_memory_is_one_sentence_with_three_settings(settings, error):
    def fail(step):
        if step == 3:
            raise error

    backend = NumpyBackend()
    backend.during_step = fail
    with pytest.raises(
        FishError, match="step 3 does not fit in memory .*--batch-size .*--max-seq-length or --lora-rank"
    ):
        train(backend, **settings)
    assert names(settings) == ["2"]


def test_another_error_is_not_called_out_of_memory(settings):
    backend = NumpyBackend()
    backend.during_step = lambda step: {}["missing"]
    with pytest.raises(KeyError):
        train(backend, **settings)


def limit_files(num_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(
    ("limit", "file"), [(8000, "checkpoints/step-00000006"), (40, "trainer_log.jsonl")], ids=["checkpoint", "log"]
)
def test_a_full_disk_keeps_what_was_saved(settings, tmp_path, limit, file):
    """RLIMIT_FSIZE makes writing fail as a full disk does."""
    settings["lora_rank"] = 8
    assert in_child(lambda: train(NumpyBackend(), **{**settings, "output_dir": str(tmp_path / "whole")})) == 0
    backend = NumpyBackend()
    backend.during_step = lambda step: limit_files(limit) if step == 5 else None

    told = tmp_path / "told"

    def child():
        try:
            train(backend, **settings)
        except FishError as error:
            limit_files(resource.RLIM_INFINITY)
            told.write_text(str(error))

    assert in_child(child) == 0
    assert told.read_text().startswith(f"cannot write {settings['output_dir']}/{file.split('/')[0]}")
    assert "File too large" in told.read_text()
    assert "checkpoints/step-00000004; to continue: mlx-fish train --resume --output-dir" in told.read_text()
    assert names(settings) == ["2", "4"]
    assert in_child(lambda: resume(NumpyBackend(), output_dir=settings["output_dir"])) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_full_device_is_one_sentence(tmp_path):
    with pytest.raises(FishError, match="cannot write .*: "):
        write_bytes(Path("/dev/full/x"), b"x")
    link = tmp_path / "full"
    link.symlink_to("/dev/full")
    write_bytes(link, b"x")  # replaced, not written through
    assert not link.is_symlink()


def command(*arguments, **streams):
    return subprocess.run([sys.executable, "-m", "mlx_fish", *arguments], check=False, **streams)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_full_standard_streams(tmp_path):
    """Answers that cannot be written are an error in words; progress that cannot be shown does not end a run."""
    with open("/dev/full", "w") as full:
        done = command("evaluate", "--model", "tiny", cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert "Error: cannot write the output: No space left on device." in done.stderr
        assert "Traceback" not in done.stderr
        done = command("train", "--model", "tiny", "--iters", "1", cwd=tmp_path, stderr=full)
    assert done.returncode == 0
    load_adapter(tmp_path / "finetuned_model")


def test_no_room_is_said_before_the_model_loads(settings, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    backend = NumpyBackend()
    backend.attach = lambda spec, arrays, **rest: pytest.fail("it went on")
    with pytest.raises(
        FishError, match=r"needs about 17 MB for the adapter and 3 checkpoints, but the disk has only 1 MB free"
    ):
        train(backend, **settings)
    assert not Path(settings["output_dir"]).exists()


def test_the_estimate_is_not_below_what_a_run_takes(settings, monkeypatch):
    settings |= {"lora_rank": 64, "num_layers": None, "lora_target": "all"}
    train(NumpyBackend(), **settings)
    taken = sum(path.stat().st_size for path in Path(settings["output_dir"]).rglob("*.safetensors"))
    asked = {}
    monkeypatch.setattr(
        run_folder.shutil,
        "disk_usage",
        lambda path: asked.update(asked=True) or namedtuple("u", "free")(taken + (16 << 20)),
    )
    with pytest.raises(
        FishError, match="needs about"
    ):  # between the second checkpoint and the removal of the first there are three
        train(NumpyBackend(), **settings, overwrite=True)
    assert asked


def test_no_permission(tmp_path):
    """As an ordinary user: root may write everywhere."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o555)

    def child():
        if os.geteuid() == 0:
            os.setegid(65534)
            os.seteuid(65534)
        for work in (lambda: run_folder.locked(place / "run").__enter__(), lambda: write_bytes(place / "x", b"x")):
            try:
                work()
            except FishError as error:
                assert "Permission denied" in str(error)
                assert len(str(error).splitlines()) == 1
            else:
                raise AssertionError("it was written")

    try:
        assert in_child(child, tmp_path / "stderr") == 0, (tmp_path / "stderr").read_text()
        assert not list(place.iterdir())
    finally:
        shutil.rmtree(place)


def test_a_folder_below_a_file(settings, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FishError, match="cannot write into .*Not a directory"):
        train(NumpyBackend(), **{**settings, "output_dir": str(tmp_path / "file" / "run")})


def test_a_checkpoint_of_another_shape_is_refused(settings, tiny):
    """A manifest proves that nothing changed by accident, not who wrote it."""
    from mlx_fish.data.dataset import load_dataset
    from mlx_fish.runs.checkpoint import Checkpoint
    from mlx_fish.runs.resume import ResumePoint, check_arrays

    job = make_job(TrainConfig(**settings), tiny, load_dataset(settings["data"]))
    good = initial_arrays(job.spec, 0)
    moments = {f"{moment}.{name}": array for moment in "mv" for name, array in good.items()}
    check_arrays(ResumePoint(Path(), {}, Checkpoint(1, good, moments, {})), job)
    for adapter, optimizer in (
        (dict(list(good.items())[1:]), moments),
        (good, {}),
        ({**good, "x": good[next(iter(good))]}, moments),
    ):
        with pytest.raises(FishError, match="does not fit"):
            check_arrays(ResumePoint(Path(), {}, Checkpoint(1, adapter, optimizer, {})), job)


def test_bad_rows_are_told_together_or_left_out_and_counted(settings, tmp_path):
    """Those that cannot be read, and those that only the template or the length limit finds."""
    with open(settings["data"], "a", encoding="utf-8") as file:
        for row in (
            '{"question": ',
            '{"question": "x<|im_end|>", "answer": "y"}',
            '{"question": "<|im_start|>", "answer": "z"}',
        ):
            file.write(row + "\n")
    with pytest.raises(FishError, match=r"rows.jsonl:31: not valid JSON") as error:
        train(NumpyBackend(), **settings)
    assert len(str(error.value).splitlines()) == 1
    assert not Path(settings["output_dir"]).exists()
    errors = tmp_path / "stderr"
    assert in_child(lambda: train(NumpyBackend(), **settings, skip_bad_rows=True), errors) == 0
    assert "! 3 broken rows are skipped; the first: " in errors.read_text()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["skipped_rows"] == 3
    assert record["data"]["rows"] == 24
    lines = Path(settings["data"]).read_text(encoding="utf-8").splitlines()
    Path(settings["data"]).write_text("\n".join(lines[:30] + lines[31:]), encoding="utf-8")
    with pytest.raises(FishError, match=r"rows.jsonl:31: (.|\n)*rows.jsonl:32: .*control token"):
        train(NumpyBackend(), **{**settings, "overwrite": True})


def test_load_backend_is_what_the_loop_calls():
    """The tests above put a NumPy backend in its place; this is the place."""
    from mlx_fish.training import train as training

    assert training.load_backend is load_backend
