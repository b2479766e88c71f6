"""A model folder, an adapter or a run from a stranger: no code of theirs runs, nothing leaves its folder, (`test_readers_fuzz.py`: no reader is led astray)

Every attack would make a marker file.
"""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_fish.adapters.peft import load_adapter
from mlx_fish.cli import main
from mlx_fish.data.templates.tokenizer import load_tokenizer
from mlx_fish.errors import FishError
from mlx_fish.models.hub import find_model
from mlx_fish.storage.tensors import open_weights

pytestmark = pytest.mark.process


class Attack:
    """Unpickling it makes the marker."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch '{self.marker}'",))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "MARKER"


@pytest.fixture
def model(tmp_path, tiny):
    shutil.copytree(tiny.path, tmp_path / "model")
    return tmp_path / "model"


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(*arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    return result.stderr


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.npz"])
def test_pickles_are_refused_unread(model, marker, name, monkeypatch):
    (model / "model.safetensors").unlink()
    content = pickle.dumps(Attack(marker))
    if name.endswith(".npz"):
        file = io.BytesIO()
        np.savez(file, weights=np.array([Attack(marker)], dtype=object))
        content = file.getvalue()
    (model / name).write_bytes(content)
    opened = []
    real = open
    monkeypatch.setattr(
        "builtins.open", lambda path, *rest, **named: opened.append(str(path)) or real(path, *rest, **named)
    )
    message = refused("train", "--model", str(model), "--iters", "1")
    assert "safetensors" in message
    assert not [path for path in opened if path.endswith(name)]
    assert not marker.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapters.npz"])
def test_pickled_adapters_are_refused_unread(tmp_path, marker, name):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (folder / name).write_bytes(pickle.dumps(Attack(marker)))
    assert "adapter_model.safetensors" in refused("fuse", "--to-hf", "--adapter", str(folder))
    assert not marker.exists()


def test_a_pickle_that_calls_itself_safetensors_is_refused(model, marker):
    (model / "model.safetensors").write_bytes(pickle.dumps(Attack(marker)))
    assert "not a valid safetensors file" in refused("train", "--model", str(model), "--iters", "1")
    assert not marker.exists()


def test_a_models_code_does_not_run(model, marker, tmp_path):
    """`auto_map` and stray .py files are left alone: the model trains as if they were not there."""
    code = f"open({str(marker)!r}, 'w')\nclass Evil: ...\n"
    for name in (
        "modeling_evil.py",
        "tokenization_evil.py",
        "configuration_evil.py",
        "sitecustomize.py",
        "numpy.py",
        "__init__.py",
    ):
        (model / name).write_text(code)
    classes = {name: f"{module}.Evil" for name, module in (
        ("AutoConfig", "configuration_evil"), ("AutoModelForCausalLM", "modeling_evil"), ("AutoModel", "modeling_evil"),
    )}  # fmt: skip
    change(model / "config.json", auto_map={**classes, "AutoTokenizer": ["tokenization_evil.Evil", None]})
    change(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]},
    )
    output = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "mlx_fish", "train", "--model", str(model), "--iters", "1", "--output-dir", str(output)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert not marker.exists()
    assert done.returncode == 0, done.stderr
    assert not list(output.rglob("*.py"))
    assert "auto_map" not in "".join(path.read_text() for path in output.glob("*.json"))


def test_a_model_that_asks_to_run_its_file_is_refused(model, marker):
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    change(model / "config.json", model_file="evil.py")
    assert "asks to run the model's own code" in refused("train", "--model", str(model), "--iters", "1")
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "a\0.safetensors",
        "x" * 300 + ".safetensors",
        "",
        "..",
        "\ud800.safetensors",
    ],
)
def test_a_shard_index_stays_in_its_folder(model, tmp_path, name):
    shutil.copyfile(model / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FishError, match="plain .safetensors names were expected"):
        open_weights(model)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "../" * 2000, "\ud800"])
def test_names_that_no_folder_can_have(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option in ("--output-dir", "--model", "--data"):
        refused("train", "--model", "tiny", "--iters", "1", option, name)
    assert not list(tmp_path.iterdir())


def test_a_tensors_name_is_no_path(model, tmp_path):
    """In a base it is only a name; in an adapter it is refused."""
    from mlx_fish.storage.tensors import write_safetensors

    weights = open_weights(model)
    arrays = {name: weights.read(name) for name in weights} | {"../../../escape": np.zeros((2, 2), np.float32)}
    write_safetensors(model / "model.safetensors", arrays)
    before = sorted(tmp_path.rglob("*"))
    CliRunner().invoke(main, ["convert", "--model", str(model), "--out", str(tmp_path / "converted")])
    assert not [
        path
        for path in tmp_path.rglob("*")
        if path not in before and tmp_path / "converted" not in (path, *path.parents)
    ]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    write_safetensors(
        adapter / "adapter_model.safetensors", {"../../escape.lora_A.weight": np.zeros((2, 2), np.float32)}
    )
    with pytest.raises(FishError, match="is not LoRA on a layer"):
        load_adapter(adapter)


def test_links_in_a_run_are_replaced_and_not_followed(tmp_path, tiny):
    """A run folder from a stranger, with links where `--resume` and `--overwrite` write."""
    from numpy_backend import NumpyBackend
    from runs import SMALL, resume, train, write_rows

    mine = tmp_path / "mine"
    mine.mkdir()
    for number in range(9):
        (mine / f"step-0000000{number}").mkdir()
        (mine / f"step-0000000{number}" / "letter").write_text("mine")
    (mine / "letter").write_text("mine")
    run = {**SMALL, "data": str(write_rows(tmp_path / "rows.jsonl")), "output_dir": str(tmp_path / "run")}
    train(NumpyBackend(), **run)
    for name in ("trainer_log.jsonl", "adapter_model.safetensors", "run.json", "tokenizer.json", "README.md"):
        target = tmp_path / "run" / name
        content = target.read_bytes()
        target.unlink()
        (mine / name).write_bytes(content)
        target.symlink_to(mine / name)
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    resume(NumpyBackend(), output_dir=run["output_dir"], iters=8)
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").symlink_to(mine)
    with pytest.raises(FishError, match="is a symbolic link"):
        resume(NumpyBackend(), output_dir=run["output_dir"])
    train(NumpyBackend(), **run, overwrite=True)
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before


def test_a_tokenizer_that_is_no_tokenizer(model):
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(FishError, match="cannot be loaded"):
        load_tokenizer(find_model(str(model)))
