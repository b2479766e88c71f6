"""The small programs that people start from, and the hook that counts what ran on which backend."""

import pytest
from programs import run

pytestmark = pytest.mark.process


def test_finetune_then_ask(tmp_path):
    done = run("scripts/simple_finetune.py", "tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "finetuned_model" / "adapter_model.safetensors").is_file()
    done = run("scripts/inference.py", cwd=tmp_path, typed="金鱼为什么浮头？\n\n\n换水\n鱼缸 60 升\nexit\n")
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.split("\n\n") if line.strip()]
    assert len(answers) == 2
    assert "Question" not in done.stdout
    alone = run(
        "scripts/inference.py", "tiny", cwd=tmp_path, typed="金鱼为什么浮头？\n\n"
    )  # the end of the input leaves too
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.strip()


@pytest.mark.parametrize("script", ["scripts/simple_finetune.py", "scripts/inference.py"])
def test_a_missing_model_is_one_sentence(tmp_path, script):
    done = run(script, str(tmp_path / "nowhere.gguf"), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
