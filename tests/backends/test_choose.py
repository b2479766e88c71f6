"""Which backend is taken, and that each works where the other is not installed."""

import json
import subprocess
import sys

import pytest

from mlx_fish.backends import choose as backends
from mlx_fish.backends.choose import VARIABLE, choose_backend
from mlx_fish.errors import FishError

pytestmark = pytest.mark.process

MAC, LINUX, INTEL_MAC, WINDOWS = ("darwin", "arm64"), ("linux", "x86_64"), ("darwin", "x86_64"), ("win32", "AMD64")


@pytest.fixture
def on(monkeypatch):
    """`on(machine, installed)` pretends to be there."""

    def pretend(machine, installed, variable=None):
        monkeypatch.setattr(sys, "platform", machine[0])
        monkeypatch.setattr(backends.platform, "machine", lambda: machine[1])
        monkeypatch.setattr(backends, "_installed", lambda name: name in installed)
        if variable is None:
            monkeypatch.delenv(VARIABLE, raising=False)
        else:
            monkeypatch.setenv(VARIABLE, variable)

    return pretend


BOTH = ("mlx", "torch")


@pytest.mark.parametrize(
    ("machine", "installed", "variable", "asked", "expected"),
    [
        (MAC, BOTH, None, "auto", "mlx"),
        (MAC, ("torch",), None, "auto", "torch"),
        (LINUX, BOTH, None, "auto", "torch"),
        (LINUX, ("mlx",), None, "auto", "mlx"),
        (INTEL_MAC, BOTH, None, "auto", "torch"),
        (WINDOWS, ("torch",), None, "auto", "torch"),
        (LINUX, BOTH, "mlx", "auto", "mlx"),
        (LINUX, BOTH, "auto", "auto", "torch"),
        (LINUX, BOTH, "", "auto", "torch"),
        (MAC, BOTH, "mlx", "torch", "torch"),
    ],
)
def test_what_is_taken(on, machine, installed, variable, asked, expected):
    on(machine, installed, variable)
    assert choose_backend(asked) == expected


@pytest.mark.parametrize(
    ("machine", "installed", "variable", "asked", "message"),
    [
        (LINUX, ("torch",), None, "mlx", r"--backend mlx: mlx is not installed; run `pip install \"mlx-fish\[mlx\]\"`"),
        (MAC, ("mlx",), None, "torch", r"torch is not installed; run `pip install \"mlx-fish\[torch\]\"`"),
        (LINUX, ("torch",), "mlx", "auto", "MLX_FISH_BACKEND mlx: mlx is not installed"),
        (LINUX, BOTH, "tosch", "auto", "Did you mean `torch`"),
        (LINUX, (), None, "auto", r"run `pip install \"mlx-fish\[torch\]\"`"),
        (MAC, (), None, "auto", r"run `pip install \"mlx-fish\[mlx\]\"`"),
    ],
)
def test_what_is_missing_is_said_with_its_command(on, machine, installed, variable, asked, message):
    on(machine, installed, variable)
    with pytest.raises(FishError, match=message):
        choose_backend(asked)


WITHOUT = """
import importlib.metadata, os, sys
os.environ.pop("MLX_FISH_BACKEND", None)
for package in {packages!r}:  # as if it were not installed
    sys.modules[package] = None
version = importlib.metadata.version
def of_the_others(name):
    if name.replace("-", "_") in {packages!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = of_the_others
from mlx_fish.cli import main

for command in {commands!r}:
    main(command, standalone_mode=False)
"""
TRAIN = ["train", "--model", "base", "--iters", "2"]
REST = [
    ["generate", "-p", "金鱼", "--max-tokens", "4"],
    ["evaluate"],
    ["fuse", "--to-hf"],
]


def without(packages, commands, folder):
    code = WITHOUT.format(packages=packages, commands=commands)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)


def test_everything_but_quantising_works_without_mlx(tmp_path):
    from tiny_folders import weights, write_gguf

    write_gguf(tmp_path / "small.gguf", weights())
    convert = ["convert", "--model", "tiny", "--out", "base", "--dtype", "float32"]
    gguf = ["convert", "--model", "small.gguf", "--out", "from-gguf", "--dtype", "bfloat16"]
    done = without(["mlx", "mlx_lm"], [convert, gguf, TRAIN, *REST], tmp_path)
    assert "computing   torch on " in done.stderr, done.stderr
    assert (tmp_path / "fused_model" / "model.safetensors").is_file(), done.stderr
    assert (tmp_path / "from-gguf" / "model.safetensors").is_file()
    packages = json.loads((tmp_path / "finetuned_model" / "run.json").read_text())["packages"]
    assert set(packages) == {"numpy", "transformers", "torch", "peft"}
    done = without(["mlx", "mlx_lm"], [["convert", "--model", "tiny", "--out", "q", "-q", "4"]], tmp_path)
    assert "pip install 'mlx-fish[mlx]'" in done.stderr


def test_everything_works_without_torch(tmp_path):
    convert = ["convert", "--model", "tiny", "--out", "base", "--dtype", "float32"]
    done = without(["torch", "peft"], [convert, TRAIN, *REST], tmp_path)
    assert "computing   mlx on " in done.stderr, done.stderr
    assert (tmp_path / "fused_model" / "model.safetensors").is_file(), done.stderr
