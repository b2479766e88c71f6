"""The small programs that people start from, and the hook that counts what ran on which backend."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


def run(script, *arguments, cwd, typed=""):
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=typed, check=False)


def test_finetune_then_ask(tmp_path):
    done = run("simple_finetune.py", "tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "finetuned_model" / "adapter_model.safetensors").is_file()
    done = run("inference.py", cwd=tmp_path, typed="金鱼为什么浮头？\n\n\n换水\n鱼缸 60 升\nexit\n")
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.split("\n\n") if line.strip()]
    assert len(answers) == 2
    assert "Question" not in done.stdout
    alone = run("inference.py", "tiny", cwd=tmp_path, typed="金鱼为什么浮头？\n\n")  # the end of the input leaves too
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.strip()


@pytest.mark.parametrize("script", ["simple_finetune.py", "inference.py"])
def test_a_missing_model_is_one_sentence(tmp_path, script):
    done = run(script, str(tmp_path / "nowhere.gguf"), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("other", ["trainer", "mlx-lm", "mlx-lm-ours"])
def test_the_benchmark_measures_both_and_checks_that_they_agree(tmp_path, other):
    done = run("bench.py", "--vs", other, "--updates", "5", "--rounds", "1", "--json", "bench.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| ratio |" in done.stdout
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [run["system"] for run in record["runs"]] == ["mlx-fish", other]
    assert 0 <= record["agreement"] < 1e-5  # with mlx-lm's own mask it is 0.25
    for measured in record["runs"]:
        assert measured["tokens_per_second"] > 0 and measured["memory"] > 0 and len(measured["losses"]) == 3
        assert 0 <= measured["padding"] < 0.5


def test_the_benchmark_cuts_the_model_and_makes_rows_of_one_length(tmp_path):
    flags = ["--layers", "1", "--length", "32", "--batch-size", "2", "--grad-checkpoint"]
    command = ["--vs", "mlx-lm", "--updates", "4", "--rounds", "1", "--json", "bench.json", *flags]
    done = run("bench.py", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["agreement"] < 1e-5
    assert [run["padding"] for run in record["runs"]] == [pytest.approx(1 / 32)] * 2  # 31 of 32 positions predict
    assert "--layers 5" in run("bench.py", "--layers", "5", cwd=tmp_path).stderr
    assert "--backend mlx" in run("bench.py", "--vs", "mlx-lm", "--backend", "torch", cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("chosen", "code", "counts"), [("", 0, "mlx: 1, on torch: 1"), ("mlx", 1, "mlx: 1, on torch: 0")]
)
def test_a_backend_that_ran_no_test_fails_the_suite(tmp_path, chosen, code, counts):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text("def test_it(backend_name):\n    assert backend_name\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--each-backend", "-k", chosen]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert counts in done.stdout
