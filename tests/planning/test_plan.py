"""What `mlx-fish plan` tells, and what `train` makes of it."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from numpy_backend import NumpyBackend
from runs import SMALL, resume, train, write_rows

from mlx_fish.backends.choose import VARIABLE
from mlx_fish.cli import main
from mlx_fish.config import TrainConfig
from mlx_fish.errors import FishError
from mlx_fish.models.folder import ModelFolder
from mlx_fish.models.hub import find_model
from mlx_fish.planning import machine
from mlx_fish.planning import plan as planning
from mlx_fish.planning.job import describe, load_data, make_job
from mlx_fish.planning.machine import GIB, MAC_MINIS, Machine, parse_memory, this_machine
from mlx_fish.planning.memory import Shape, peak_of
from mlx_fish.planning.outlook import Outlook

pytestmark = pytest.mark.process

SMALL_MACHINE = Machine("a small machine", 60_000_000, "cpu", 1e11, 1e10)


def job_of(**settings):
    config = TrainConfig(**{"model": "tiny", "backend": "mlx", "iters": 20, **settings})
    return make_job(config, find_model(config.model), load_data(config))


def test_the_command_answers_on_stdout(tmp_path):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "mlx_fish", "plan", "--model", "tiny", "--backend", "mlx"],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert time.monotonic() - started < 30  # 2 s on a quiet machine
    for word in ("peak memory", "weights", "adapter", "activations", "loss", "--batch-size", "Mac mini M4 16 GB"):
        assert word in done.stdout
    assert "trainable" in done.stderr
    assert not list(tmp_path.iterdir())


def test_json_is_one_object_of_numbers():
    done = CliRunner().invoke(main, ["plan", "--model", "tiny", "--backend", "mlx", "--memory", "16GB", "--json"])
    found = json.loads(done.stdout)
    parts = found["peak_bytes"]
    assert parts.pop("total") == sum(parts.values())
    assert found["machine"]["memory"] == 16 * GIB
    assert found["usable_bytes"] < 16 * GIB
    assert found["fits"] is True
    assert found["largest"]["on"]["batch_size"] >= found["largest"]["off"]["batch_size"] > 4
    assert found["estimated_seconds"] > 0
    assert [mini["name"] for mini in found["mac_minis"]] == [mini.name for mini in MAC_MINIS]


def test_no_framework_is_imported_by_planning():
    code = "import sys, mlx_fish.planning.plan; assert not {'mlx', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16 * GIB), ("16 GiB", 16 * GIB), ("512m", 512 << 20), ("1.5g", 3 * GIB // 2)]
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "16", "GB", "-1GB", "nanGB", "lots"])
def test_wrong_sizes_are_a_mistake_in_the_usage(text):
    done = CliRunner().invoke(main, ["plan", "--memory", text])
    assert done.exit_code == 2
    assert "16GB" in done.stderr


def test_metal_lets_two_thirds_be_used_and_a_plan_less():
    assert MAC_MINIS[0].working_set == pytest.approx(11.45e9, rel=0.01)  # what Metal recommends on 16 GB
    assert 0.75 <= MAC_MINIS[0].usable / MAC_MINIS[0].working_set <= 0.85


def test_advice_really_fits():
    """Each advice, followed, makes a plan that fits the same machine, and what is said to be the largest is the largest."""
    job = job_of(batch_size=8)
    plan = planning.make_plan(job, SMALL_MACHINE)
    assert plan.fits is False
    assert plan.advice
    for advice in plan.advice:
        if not advice.startswith("--"):
            continue
        words = advice.split()
        changes = dict(zip((word[2:].replace("-", "_") for word in words[::2]), words[1::2], strict=True))
        changes = {name: value if value == "on" else int(value) for name, value in changes.items()}
        followed = planning.make_plan(job_of(**{"batch_size": 8, **changes}), SMALL_MACHINE)
        assert followed.fits, (advice, followed.peak)
    largest = plan.largest[1].batch_size
    assert largest < 8
    assert planning.make_plan(job_of(batch_size=largest, grad_checkpoint="on"), SMALL_MACHINE).fits
    assert not planning.make_plan(job_of(batch_size=largest + 2, grad_checkpoint="on"), SMALL_MACHINE).fits


@pytest.mark.parametrize("asked", ["off", "auto"])
@pytest.mark.parametrize("memory", [23_000_000, 25_000_000, 27_000_000])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_a_validation_needs_is_not_promised_away(asked, memory, batch_size):
    """Few rows an update and one adapted block: the validation's batches are the peak, and checkpointing makes them no smaller."""
    settings = {"num_layers": 1, "batch_size": batch_size, "iters": 400, "grad_checkpoint": asked}
    machine = replace(SMALL_MACHINE, memory=memory)
    plan = planning.make_plan(job_of(**settings), machine)
    assert plan.fits is False
    assert plan.worst.tokens > 600
    assert not plan.grad_checkpoint
    for advice in plan.advice:
        assert advice.startswith(("--max-seq-length", "--grad-checkpoint on --max", "a 4-bit base")), plan.advice


@pytest.mark.parametrize(("asked", "memory", "resolved"), [
    ("auto", None, False), ("auto", 10**12, False), ("auto", 10**7, True), ("on", 10**12, True), ("off", 10**7, False),
])  # fmt: skip
def test_checkpointing_is_decided_by_need(asked, memory, resolved):
    plan = planning.make_plan(job_of(grad_checkpoint=asked), replace(SMALL_MACHINE, memory=memory))
    assert plan.grad_checkpoint is resolved


def test_torch_has_no_checkpointing_beside_dropout():
    job = job_of(grad_checkpoint="auto", lora_dropout=0.1, backend="torch")
    assert not planning.make_plan(job, replace(SMALL_MACHINE, memory=10**7)).grad_checkpoint


def test_unknown_memory_or_a_guess_refuses_nothing():
    job = job_of()
    planning.refuse(planning.make_plan(job, replace(SMALL_MACHINE, memory=None)))
    rough = planning.make_plan(job_of(backend="torch"), replace(SMALL_MACHINE, memory=20_000_000))
    assert rough.fits is False
    planning.refuse(rough)
    with pytest.raises(FishError, match="weights"):
        planning.refuse(planning.make_plan(job_of(backend="torch"), replace(SMALL_MACHINE, memory=1_000_000)))


def test_the_time_grows_with_the_work():
    machine = replace(SMALL_MACHINE, memory=None)
    once, twice = (planning.make_plan(job_of(iters=iters), machine).seconds for iters in (78, 156))
    assert twice == pytest.approx(2 * once, rel=0.1)
    assert planning.make_plan(job_of(grad_checkpoint="on", iters=78), machine).seconds > 1.1 * once
    assert planning.make_plan(job_of(), replace(machine, flops=None)).seconds is None


def test_this_machine_is_known():
    machine = this_machine("mlx")
    assert machine.memory > 10**8
    assert machine.usable < machine.memory


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "mlx")
    return {**SMALL, "data": str(write_rows(tmp_path / "rows.jsonl")), "output_dir": str(tmp_path / "run")}


def crowded(monkeypatch, memory):
    monkeypatch.setattr(planning, "this_machine", lambda backend: replace(SMALL_MACHINE, memory=memory))


def test_train_refuses_what_cannot_fit_before_it_writes(settings, tmp_path, monkeypatch, capfd):
    crowded(monkeypatch, 1_000_000)
    with pytest.raises(FishError, match="--force"):
        train(NumpyBackend(), **settings)
    assert not (tmp_path / "run").exists()
    assert "peak about" in capfd.readouterr().err


def test_force_trains_all_the_same(settings, monkeypatch):
    from mlx_fish.training import train as training

    crowded(monkeypatch, 1_000_000)
    monkeypatch.setattr(training, "load_backend", lambda *arguments, **options: NumpyBackend())
    assert training.train(TrainConfig(**settings), force=True).is_dir()


def test_a_resumed_run_keeps_what_was_decided(settings, tmp_path, monkeypatch):
    """Begun where memory was short, it goes on with checkpointing where memory is plenty, and the other way round."""
    crowded(monkeypatch, None)
    backend = NumpyBackend()
    train(backend, **settings)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert recorded["grad_checkpoint"] == "off"
    monkeypatch.setattr(planning, "_needs_checkpointing", lambda outlook: True)
    assert planning.make_plan(job_of(**{**settings, "iters": 8})).grad_checkpoint, "anew, it would be switched on"
    monkeypatch.setattr(planning, "refuse", lambda plan, resuming: None)
    resume(NumpyBackend(), output_dir=settings["output_dir"], iters=8, grad_checkpoint="auto")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["grad_checkpoint"] == "off"
    with pytest.raises(FishError, match="--grad-checkpoint on .was off."):
        resume(NumpyBackend(), output_dir=settings["output_dir"], iters=9, grad_checkpoint="on")


@pytest.mark.parametrize(("arguments", "expected"), [
    ([], "auto"), (["--grad-checkpoint"], "on"), (["--grad-checkpoint", "off"], "off"), (["--gradient_checkpointing"], "on"),
    (["--config", "true.yaml"], "on"), (["--config", "off.yaml"], "off"), (["--config", "auto.yaml"], "auto"),
    (["--config", "true.yaml", "--grad-checkpoint", "off"], "off"),
])  # fmt: skip
def test_the_switch_is_read_as_people_write_it(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "true.yaml").write_text("gradient_checkpointing: true\n")
    (tmp_path / "off.yaml").write_text("grad_checkpoint: off\n")
    (tmp_path / "auto.yaml").write_text("grad_checkpoint: auto\n")
    seen = []
    monkeypatch.setattr("mlx_fish.training.train.train", lambda config, **options: seen.append(config.grad_checkpoint))
    done = CliRunner().invoke(main, ["train", *arguments])
    assert done.exit_code == 0, done.output
    assert seen == [expected]


def test_a_tokenizer_of_another_model_is_named_before_it_loads():
    job = job_of()
    small = ModelFolder(job.folder.path, "small")
    small.config["vocab_size"] = 100
    with pytest.raises(FishError, match=r"jsonl:\d+ contains token id \d+, but small has only 100 embeddings"):
        make_job(job.config, small, job.dataset)


@pytest.mark.parametrize(("device", "positions"), [("cpu", 256), ("metal", 4096), ("cuda", 8192)])
def test_torch_is_planned_with_as_many_positions_as_it_computes_at_a_time(device, positions):
    job = job_of(backend="torch", batch_size=64)
    outlook = Outlook(job, replace(SMALL_MACHINE, device=device), "torch")
    shape = Shape(tokens=200 * 128, rows=200, width=128, labels=200 * 64)
    rows = positions // 128
    piece = Shape(tokens=rows * 128, rows=rows, width=128, labels=rows * 64)
    expected = peak_of(outlook.model, job.spec, piece, grad_checkpoint=False)
    assert outlook.peak_of(shape, grad_checkpoint=False).activations == expected.activations


def test_no_batch_is_laid_out_before_the_model_loads(monkeypatch):
    """An epoch's padding and shapes are counted from lengths; laying out every batch would take a minute for 100,000 rows."""
    monkeypatch.setattr("mlx_fish.data.order.make_batch", lambda *rows, **sizes: pytest.fail("a batch was laid out"))
    job = job_of()
    monkeypatch.setattr(job.updates, "collate", lambda *rows, **sizes: pytest.fail("a batch was laid out"))
    describe(job)
    planning.make_plan(job, SMALL_MACHINE)


@pytest.mark.parametrize(
    ("visible", "asked"), [(None, "0"), ("1,0", "1"), ("GPU-8b,1", "GPU-8b"), ("", None), ("-1", None)]
)
def test_the_gpu_planned_for_is_the_one_that_computes(monkeypatch, visible, asked):
    seen = []

    def smi(command, **options):
        seen.append(command[-1])
        return SimpleNamespace(stdout="NVIDIA T4, 15360\n")

    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(machine, "distributions", lambda: [SimpleNamespace(name="torch", version="2.13.0+cu130")])
    monkeypatch.setattr(machine.subprocess, "run", smi)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = machine.this_machine("torch")
    if asked is None:
        assert found.device != "cuda"
    else:
        assert (found.name, found.memory, found.device, seen) == ("NVIDIA T4", 15360 << 20, "cuda", [f"--id={asked}"])
