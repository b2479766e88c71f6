"""Where the targets of one `fuse` go, and what the command line refuses or answers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fuse_models import make_adapter

from mlx_fish.cli import main
from mlx_fish.errors import FishError
from mlx_fish.export.targets import DEFAULT_OUT, Target, with_folders

pytestmark = pytest.mark.process


def test_places() -> None:
    two = [Target("hf"), Target("gguf", file_types=("q8_0",))]
    assert [target.out for target in with_folders(two, None)] == [Path("fused_model"), Path("fused_gguf")]
    assert [target.out for target in with_folders(two, Path("x"))] == [Path("x/hf"), Path("x/gguf")]
    assert with_folders(two[:1], Path("x"))[0].out == Path("x")
    assert len(set(DEFAULT_OUT.values())) == len(DEFAULT_OUT)
    with pytest.raises(FishError, match="expected a folder"):
        with_folders(two, Path("fish.gguf"))


def fish(*arguments: str, cwd: Path) -> Any:
    command = [sys.executable, "-m", "mlx_fish", "fuse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--create", "--to-hf"], 2, "--create requires --to-ollama"),
        (["--ollama-adapter", "--to-hf"], 2, "--ollama-adapter requires --to-ollama"),
        (["--mlx-bits", "4", "--to-hf"], 2, "--mlx-bits requires --to-mlx"),
        (["--dtype", "float32", "--to-gguf", "f16"], 2, "--dtype requires --to-hf or --to-mlx"),
        (["--to-gguf", "q9"], 2, "is not one of"),
        (["--to-hf", "--out", "x.gguf"], 1, "expected a folder"),
        (["--to-ollama", "Fish Doctor"], 1, "expected a name of lower-case letters"),
        (["--to-ollama", "--create"], 1, "needs `ollama` on the PATH"),
    ],
)
def test_mistakes(
    arguments: list[str], code: int, message: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "finetuned_model", tiny, size=1e-2)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["fuse", *arguments, "--model", "tiny"])
    assert done.exit_code == code and message in done.stderr, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["finetuned_model"]


def test_several_targets_in_one_call_are_read_back(tiny: Any, tmp_path: Path) -> None:
    """The tiny model is small, so that reading back is the default."""
    make_adapter(tmp_path / "finetuned_model", tiny, size=1e-2)
    done = fish(
        "--to-hf", "--to-gguf", "q8_0", "--to-gguf-adapter", "--dtype", "float32", "--model", "tiny", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fused_model\nfused_gguf\nadapter_gguf\n"
    for artifact, reader in (
        ("fused_model", "transformers"),
        ("fused_gguf/model-q8_0.gguf", "llama.cpp"),
        ("adapter_gguf/adapter.gguf", "llama.cpp"),
    ):
        assert f"{artifact} read by {reader}: max difference" in done.stderr
    assert "of the adapter's change kept" in done.stderr
    again = fish("--to-ollama", "fish", "--no-verify", "--model", "tiny", cwd=tmp_path)
    assert again.returncode == 0, again.stderr  # another target: another folder
    assert again.stdout == "fused_ollama\n" and "read by" not in again.stderr
