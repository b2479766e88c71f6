"""A run that is stopped and goes on equals one that was never stopped: the losses to the bit, the adapter to the byte."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from numpy_backend import NumpyBackend
from paths import TESTS
from runs import SMALL, in_child, log_of, outcome, resume, train, write_rows

from mlx_fish.adapters.peft import WEIGHTS_FILE
from mlx_fish.errors import FishError
from mlx_fish.runs.checkpoint import checkpoints, damage, newest_valid, save_checkpoint

pytestmark = pytest.mark.process

HERE = TESTS / "helpers"
EPOCH = 6  # updates over the 24 training rows of `write_rows`


def command(*arguments, cwd, stop=None):
    """`mlx-fish ARGUMENTS…` in a new process; `stop`: (signal's name, update during which it comes)."""
    program = [str(HERE / "stopping.py"), stop[0], str(stop[1])] if stop else ["-m", "mlx_fish"]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


REAL = {
    "accumulation, dropout, validated at every step": (
        ["--seed", 0, "--grad-accumulation", 2, "--lora-dropout", 0.1, "--eval-every", 1, "--logging-steps", 2],
        [("SIGTERM", 5)],
    ),
    "killed twice, epochs crossed, no packing, no other validation": (
        ["--no-packing", "--seed", 1, "--batch-size", 8, "--save-every", 2, "--schedule", "linear", "--warmup", 3],
        [("SIGKILL", 6), ("SIGKILL", 8)],
    ),
    "interrupted twice, dropout, the alpaca template": (
        ["--seed", 2, "--lora-dropout", 0.3, "--save-every", 4, "--template", "alpaca", "--keep", 3],
        [("SIGINT", 1), ("SIGINT", 9)],
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_new_processes_end_equal_to_one_that_was_never_stopped(tmp_path, name, backend_name):
    settings, stops = REAL[name]
    write_rows(tmp_path / "rows.jsonl")
    begin = ["train", "--model", "tiny", "--data", "rows.jsonl", "--iters", 9, "--learning-rate", "1e-3", *settings]
    assert command(*begin, "--output-dir", "whole", cwd=tmp_path).returncode == 0
    arguments = [*begin, "--output-dir", "stopped"]
    for stop in stops:
        done = command(*arguments, cwd=tmp_path, stop=stop)
        signum = signal.Signals[stop[0]]
        assert done.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), done.stderr
        arguments = ["train", "--resume", "--output-dir", "stopped"]
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    assert len(log_of(tmp_path / "whole")) > 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture
def settings(rows, tmp_path):
    return {**SMALL, "data": str(rows), "output_dir": str(tmp_path / "run")}


def stopped(settings, step, *, signum=signal.SIGTERM, errors=Path(os.devnull)):
    """Train, get a signal during update `step`; returns the exit code."""
    backend = NumpyBackend()
    backend.during_step = lambda now: os.kill(os.getpid(), signum) if now == step else None
    return in_child(lambda: train(backend, **settings), errors)


@pytest.mark.parametrize(
    "changes",
    [
        {"iters": 3 * EPOCH - 1, "eval_every": 1, "logging_steps": 3, "seed": 3, "save_every": 100},
        {
            "iters": EPOCH,
            "eval_every": None,
            "logging_steps": 1,
            "batch_size": 1,
            "grad_accumulation": 4,
            "save_every": 4,
        },
    ],
)
def test_stopped_at_every_step(settings, tmp_path, changes):
    settings |= changes
    assert in_child(lambda: train(NumpyBackend(), **{**settings, "output_dir": str(tmp_path / "whole")})) == 0
    for step in range(1, settings["iters"] + 1):
        assert stopped(settings, step) == 143
        assert in_child(lambda: resume(NumpyBackend(), output_dir=settings["output_dir"])) == 0
        assert outcome(tmp_path / "run") == outcome(tmp_path / "whole"), step
        shutil.rmtree(tmp_path / "run")


@pytest.fixture
def half_done(settings, tmp_path):
    """A run stopped after 5 of 6 updates, with checkpoints at 4 and 5, and what it should come to."""
    assert in_child(lambda: train(NumpyBackend(), **{**settings, "output_dir": str(tmp_path / "whole")})) == 0
    assert stopped(settings, 5) == 143
    output = tmp_path / "run"
    assert [path.name for path in checkpoints(output / "checkpoints")] == ["step-00000004", "step-00000005"]
    return output, outcome(tmp_path / "whole")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])  # the last byte of a JSON file is only a line end


FILES = ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "harm", [flip, cut, Path.unlink, lambda path: path.write_bytes(b"")], ids=["flip", "cut", "gone", "empty"]
)
def test_a_damaged_checkpoint_is_passed_over(half_done, tmp_path, file, harm):
    output, expected = half_done
    newest = output / "checkpoints" / "step-00000005"
    harm(newest / file)
    errors = tmp_path / "stderr"
    assert in_child(lambda: resume(NumpyBackend(), output_dir=str(output)), errors) == 0, errors.read_text()
    named = "" if (file, harm) == ("manifest.json", flip) else file  # that may be the sum of any file
    assert f"! {newest} is damaged ({named}" in errors.read_text()
    assert "after 4 of 6 updates" in errors.read_text()
    assert outcome(output) == expected


def test_a_run_without_a_whole_checkpoint_is_refused(half_done):
    output, _ = half_done
    for path in checkpoints(output / "checkpoints"):
        cut(path / "state.json")
    with pytest.raises(FishError, match="no valid checkpoint .2 damaged."):
        resume(NumpyBackend(), output_dir=str(output))


@pytest.mark.parametrize("name", ["4", "step-00000004", "{output}/checkpoints/step-00000004"])
def test_a_named_checkpoint(half_done, name):
    output, expected = half_done
    named = name.format(output=output)
    place = {} if "/" in name else {"output_dir": str(output)}
    assert in_child(lambda: resume(NumpyBackend(), named, **place)) == 0
    assert outcome(output) == expected
    assert [path.name for path in checkpoints(output / "checkpoints")] == ["step-00000004", "step-00000006"]


def test_a_damaged_or_missing_checkpoint_that_is_named_is_refused(half_done):
    output, _ = half_done
    cut(output / "checkpoints" / "step-00000005" / "optimizer.safetensors")
    for name, words in {
        "5": "damaged .optimizer.safetensors has changed",
        "3": "no such checkpoint",
        "../..": "no such",
    }.items():
        with pytest.raises(FishError, match=words):
            resume(NumpyBackend(), name, output_dir=str(output))


CHANGED = {
    "seed": ({"seed": 1}, "--seed 1 .was 42."),
    "two": ({"lora_rank": 2, "learning_rate": 1.0}, "--lora-rank 2 .was 1.; --learning-rate 1.0 .was 0.0005."),
    "template": ({"template": "alpaca"}, "--template alpaca .was auto."),
    "fewer": ({"iters": 5}, "5 updates .was 6; the number can be raised, not lowered."),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_setting_is_refused_by_name(half_done, name):
    output, expected = half_done
    changes, words = CHANGED[name]
    with pytest.raises(FishError, match=words):
        resume(NumpyBackend(), output_dir=str(output), **changes)
    assert in_child(lambda: resume(NumpyBackend(), output_dir=str(output))) == 0
    assert outcome(output) == expected


def test_changed_data_is_refused_by_name(half_done, tmp_path):
    output, expected = half_done
    other = write_rows(tmp_path / "rows.jsonl", 31)
    with pytest.raises(FishError, match="the data file rows.jsonl has changed"):
        resume(NumpyBackend(), output_dir=str(output), data=str(other))
    moved = write_rows(tmp_path / "elsewhere.jsonl")
    with pytest.raises(FishError, match="the data file rows.jsonl is missing"):
        resume(NumpyBackend(), output_dir=str(output), data=str(moved))
    same = write_rows(tmp_path / "rows.jsonl")  # another place, the same content
    assert in_child(lambda: resume(NumpyBackend(), output_dir=str(output), data=str(same))) == 0
    assert outcome(output) == expected


def test_a_changed_base_or_tokenizer_is_refused_by_name(settings, tmp_path, tiny):
    model = tmp_path / "model"
    shutil.copytree(tiny.path, model)
    assert stopped({**settings, "model": str(model)}, 5) == 143
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("\n", "\n\n"))
    with pytest.raises(FishError, match="yield different tokens"):
        resume(NumpyBackend(), output_dir=settings["output_dir"])
    shutil.copyfile(tiny.path / "chat_template.jinja", template)
    from mlx_fish.storage.tensors import open_weights, write_safetensors

    weights = open_weights(model)
    arrays = {name: weights.read(name) for name in weights}
    arrays["model.norm.weight"][0] += 1
    write_safetensors(model / "model.safetensors", arrays)
    with pytest.raises(FishError, match="the base model .* has changed"):
        resume(NumpyBackend(), output_dir=settings["output_dir"])


def test_raising_iters_goes_on_as_a_run_of_that_length_would(settings, tmp_path):
    """With a constant rate the longer run is the same to the bit; else the rates from here on are those of the longer run."""
    for schedule in ("constant", "cosine"):
        longer = {
            **settings,
            "schedule": schedule,
            "iters": 10,
            "output_dir": str(tmp_path / f"{schedule} longer"),
            "eval_rows": 1,
        }
        shorter = {**longer, "iters": 6, "output_dir": str(tmp_path / schedule), "eval_every": None}
        for run in (longer, shorter):
            assert in_child(lambda: train(NumpyBackend(), **run)) == 0  # noqa: B023
        errors = tmp_path / "stderr"
        raised = {"iters": 10, "eval_every": 3, "output_dir": shorter["output_dir"]}
        assert in_child(lambda: resume(NumpyBackend(), **raised), errors) == 0  # noqa: B023
        same = (tmp_path / schedule / WEIGHTS_FILE).read_bytes() == (
            tmp_path / f"{schedule} longer" / WEIGHTS_FILE
        ).read_bytes()
        assert same == (schedule == "constant")
        assert ("extended from 6 to 10 updates" in errors.read_text()) == (schedule == "cosine")
        rates = [
            {entry["current_steps"]: entry["lr"] for entry in log_of(Path(run["output_dir"])) if "lr" in entry}
            for run in (shorter, longer)
        ]
        assert rates[0][8] == rates[1][8]
        assert rates[0][10] == rates[1][10]
        assert (rates[0][6] == rates[1][6]) == (schedule == "constant")


def test_a_complete_run_says_so(settings, tmp_path):
    assert in_child(lambda: train(NumpyBackend(), **settings)) == 0
    before = outcome(tmp_path / "run")
    errors = tmp_path / "stderr"
    assert in_child(lambda: resume(NumpyBackend(), output_dir=settings["output_dir"]), errors) == 0
    assert "is complete: all 6 updates are done" in errors.read_text()
    assert outcome(tmp_path / "run") == before


def test_what_is_no_run_of_ours(tmp_path, settings):
    with pytest.raises(FishError, match="contains no run to resume"):
        resume(NumpyBackend(), output_dir=str(tmp_path))
    (tmp_path / "run.json").write_text('{"settings": {"seed": 1}}')
    with pytest.raises(FishError, match="another version"):
        resume(NumpyBackend(), output_dir=str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


def test_keep_never_removes_the_last_whole_checkpoints(tmp_path):
    """Damaged ones of later steps do not count as the newest."""
    import numpy as np

    def save(step, keep, after):
        arrays = {"a": np.full(3, step, np.float32)}
        save_checkpoint(
            tmp_path, step, adapter=arrays, adapter_config={}, optimizer=arrays, state={}, keep=keep, after=after
        )
        return [path.name[-2:] for path in checkpoints(tmp_path)]

    assert [save(step, 3, step - 2) for step in (2, 4, 6, 8)][-1] == ["04", "06", "08"]
    cut(tmp_path / "step-00000008" / "state.json")
    cut(tmp_path / "step-00000006" / "state.json")
    assert newest_valid(tmp_path).name == "step-00000004"
    assert save(7, 2, 4) == ["04", "07"]


def test_a_manifest_cannot_name_other_files(tmp_path):
    import numpy as np

    arrays = {"a": np.zeros(3, np.float32)}
    save_checkpoint(tmp_path, 1, adapter=arrays, adapter_config={}, optimizer=arrays, state={})
    checkpoint = tmp_path / "step-00000001"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for sums in (
        {},
        {**manifest["sha256"], "../../secret": "0"},
        {"state.json": manifest["sha256"]["state.json"]},
        [],
        None,
    ):
        (checkpoint / "manifest.json").write_text(json.dumps({"step": 1, "sha256": sums}))
        assert damage(checkpoint)


def test_a_second_run_in_the_folder_is_refused(half_done, settings):
    output, expected = half_done
    backend = NumpyBackend()
    told = output.parent / "told"

    def second(step):
        errors = output.parent / "second"
        for work in (
            lambda: resume(NumpyBackend(), output_dir=str(output)),
            lambda: train(NumpyBackend(), **settings, overwrite=True),
        ):
            assert in_child(work, errors) == 1
            told.write_text(told.read_text() + errors.read_text() if told.exists() else errors.read_text())

    backend.during_step = second
    assert in_child(lambda: resume(backend, output_dir=str(output))) == 0
    assert told.read_text().count(f"another run is writing to {output}") == 2
    assert outcome(output) == expected
    assert not (output / ".lock").exists()


def test_a_base_that_answered_nothing_is_not_asked_again_after_training(settings, tmp_path):
    """The sample answer before training may be empty; after a resume it is the tuned model that would be asked."""

    class Silent(NumpyBackend):
        def generate(self, prompt, sampling, end_ids):
            return iter(())

    backend = Silent()
    backend.during_step = lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == 3 else None
    assert in_child(lambda: train(backend, **settings)) == 143
    resume(NumpyBackend(), output_dir=settings["output_dir"])
    results = json.loads((Path(settings["output_dir"]) / "run.json").read_text())["results"]
    assert results["before"] == "" and results["after"] != ""


@pytest.mark.parametrize("data", ["rows.jsonl", "sets", "mine"], ids=["file", "folder", "name"])
def test_a_run_goes_on_from_another_folder(tmp_path, monkeypatch, data):
    """The data set is found where the run found it, as the base is."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home / "sets", home / "data", elsewhere):
        folder.mkdir(parents=True)
    write_rows(home / "rows.jsonl")
    write_rows(home / "sets" / "train.jsonl")
    write_rows(home / "data" / "own.jsonl")
    (home / "data" / "dataset_info.json").write_text(
        '{"mine": {"file_name": "own.jsonl", "columns": {"prompt": "question", "response": "answer"}}}'
    )
    output = tmp_path / "run"
    monkeypatch.chdir(home)
    train(NumpyBackend(), **{**SMALL, "data": data, "output_dir": str(output)})
    monkeypatch.chdir(elsewhere)
    resume(NumpyBackend(), output_dir=str(output), iters=8)
    record = json.loads((output / "run.json").read_text())
    assert record["iters"] == 8 and record["settings"]["data"] == data
    assert Path(record["data"]["path"]).is_relative_to(home.resolve())
    write_rows(elsewhere / "rows.jsonl", count=31)
    with pytest.raises(FishError, match="the data file"):
        resume(NumpyBackend(), output_dir=str(output), iters=9, data="rows.jsonl")


def test_a_folder_that_has_moved_with_its_data_goes_on(tmp_path, monkeypatch):
    """What is no longer where the run found it is looked for as it was typed."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    write_rows(old / "rows.jsonl")
    monkeypatch.chdir(old)
    train(NumpyBackend(), **{**SMALL, "data": "rows.jsonl", "output_dir": "run"})
    monkeypatch.chdir(tmp_path)
    old.rename(new)
    monkeypatch.chdir(new)
    resume(NumpyBackend(), output_dir="run", iters=8)
    assert json.loads(Path("run/run.json").read_text())["iters"] == 8


def test_a_run_of_before_the_data_sets_place_was_noted_goes_on(settings):
    train(NumpyBackend(), **settings)
    for path in Path(settings["output_dir"]).rglob("*.json"):
        record = json.loads(path.read_text())
        for part in (record, record.get("run", {})):
            for key in ("path", "warning"):
                part.get("data", {}).pop(key, None) if isinstance(part.get("data"), dict) else None
            for key in ("stage", "use_rslora"):
                part.get("settings", {}).pop(key, None)
            part.pop("sample", None)
        if path.name == "state.json":
            path.write_text(json.dumps(record))
            manifest = json.loads((path.parent / "manifest.json").read_text())
            manifest["sha256"]["state.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
            (path.parent / "manifest.json").write_text(json.dumps(manifest))
        elif path.name == "run.json":
            path.write_text(json.dumps(record))
    resume(NumpyBackend(), output_dir=settings["output_dir"], iters=settings["iters"] + 2)
