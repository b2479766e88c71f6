"""The commands as a person meets them: what they print, how they fail, how fast `--help` is."""

import json
import subprocess
import sys
import time

import pytest
import tiny_folders
from click.testing import CliRunner
from paths import ROOT

from mlx_fish.cli import main

pytestmark = pytest.mark.process

COMMANDS = ["convert", "plan", "train", "generate", "evaluate", "fuse"]


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "mlx_fish", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_loads_no_framework(command):
    arguments = [command, "--help"] if command else ["--help"]
    code = (
        "import sys\nfrom mlx_fish.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'mlx', 'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Options:" in done.stdout
    assert time.monotonic() - started < 3  # 0.1 s on a quiet machine


BAD = [
    (["train", "--data", "missing.jsonl"], 1, "there is no such file or folder"),
    (["train", "--data", "empty.jsonl"], 1, "contains no rows"),
    (["train", "--data", "bad.jsonl"], 1, "bad.jsonl:2: not valid JSON"),
    (["train", "--data", "wrong.jsonl"], 1, "misspelled as `qustion`?"),
    (["train", "--template", "qwem"], 1, "Did you mean `qwen`?"),
    (["train", "--iters", "0"], 1, "--iters 0: expected at least 1"),
    (["train", "--iterz", "3"], 2, "--iters"),
    (["train", "--backend", "tosch"], 2, "'auto', 'mlx', 'torch'"),
    (["train", "--lora-dropout", "1"], 1, "expected at least 0 and less than 1"),
    (["train", "--config", "bad.yaml"], 1, "Did you mean `learning_rate`?"),
    (["train", "--output-dir", "full"], 1, "no run of mlx-fish"),
    (["trian"], 2, "Did you mean `train`?"),
    (["generate"], 2, "give a question with -p"),
    (["generate", "-p", " "], 1, "-p is empty"),
    (["generate", "-p", "x", "--top-p", "0.9"], 2, "--temp"),
    (["generate", "-p", "x", "--seed", "1"], 2, "--seed has no effect on greedy decoding"),
    (["generate", "--questions", "bad.jsonl", "--json"], 2, "--json requires -p"),
    (["generate", "--questions", "bad.jsonl", "--out", "nowhere/answers.jsonl"], 1, "an existing folder"),
    (["convert", "--group-size", "32"], 2, "requires -q"),
    (["fuse", "--to-hf", "--ollama-type", "f16"], 2, "requires --to-ollama"),
    (["generate", "-p", "x", "--adapter", "nowhere"], 1, "run `mlx-fish train` first"),
    (["evaluate", "--adapter", "full"], 1, "expected a folder with"),
    (["fuse"], 2, "choose a target"),
    (["fuse", "--to-hf"], 1, "run `mlx-fish train` first"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD)
def test_a_mistake_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    (tmp_path / "wrong.jsonl").write_text('{"qustion": "a", "answer": "b"}\n')
    (tmp_path / "bad.yaml").write_text("learning_rat: 1e-4\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_mistakes_show_before_a_framework_is_imported(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n")
    code = (
        "import sys\nfrom mlx_fish.cli import main\n"
        "try:\n    main(['train', '--data', 'bad.jsonl'])\nexcept SystemExit as stop:\n    assert stop.code == 1\n"
        "assert not {'mlx', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory, backend_name):
    """A folder in which `train --model tiny` was run twice, into two output folders, on each backend."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("finetuned_model", "again"):
        done = run(
            "train", "--model", "tiny", "--iters", "12", "--learning_rate", "2e-3", "--output-dir", name, cwd=folder
        )
        assert done.returncode == 0, done.stderr
    (folder / "stderr").write_text(done.stderr)
    return folder


def test_train_leaves_everything_that_a_run_should(trained):
    names = {path.name for path in (trained / "finetuned_model").iterdir()}
    assert names == {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json", "run.json", "trainer_log.jsonl", "training_loss.png", "README.md", "checkpoints",
    }  # fmt: skip
    from mlx_fish.runs.checkpoint import checkpoints, damage

    assert [path.name for path in checkpoints(trained / "finetuned_model" / "checkpoints")] == ["step-00000012"]
    assert damage(trained / "finetuned_model" / "checkpoints" / "step-00000012") is None


def test_the_log_has_the_keys_people_know_and_every_step(trained):
    log = [json.loads(line) for line in (trained / "finetuned_model" / "trainer_log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["current_steps"] for entry in steps] == list(range(1, 13))
    keys = {
        "current_steps",
        "total_steps",
        "loss",
        "lr",
        "epoch",
        "percentage",
        "elapsed_time",
        "remaining_time",
        "throughput",
        "total_tokens",
    }
    assert keys <= set(steps[0])
    validations = [entry for entry in log if "eval_loss" in entry]
    assert [entry["current_steps"] for entry in validations] == [0, 12]
    assert validations[1]["eval_loss"] < validations[0]["eval_loss"]


def test_the_same_command_gives_the_same_bytes(trained):
    first, again = trained / "finetuned_model", trained / "again"
    assert (first / "adapter_model.safetensors").read_bytes() == (again / "adapter_model.safetensors").read_bytes()
    timed = ("elapsed_time", "remaining_time", "throughput")
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key not in timed}
            for line in (folder / "trainer_log.jsonl").read_text().splitlines()
        ]
        for folder in (first, again)
    ]
    assert logs[0] == logs[1]


def test_training_again_is_refused_without_overwrite(trained):
    done = run("train", "--model", "tiny", "--iters", "1", cwd=trained)
    assert done.returncode == 1
    assert "--overwrite to replace it" in done.stderr


def test_the_terminal_shows_what_matters(trained):
    text = (trained / "stderr").read_text()
    for expected in (
        "trainable",
        "supervised",
        "padding",
        "validation",
        "before:",
        "after:",
        "tok/s",
        "Next:",
        "mlx-fish generate",
    ):
        assert expected in text
    assert len(text.splitlines()) < 45


def test_evaluate_puts_the_base_beside(trained):
    done = run("evaluate", "--json", cwd=trained)
    result = json.loads(done.stdout)
    assert set(result) == {"loss", "perplexity", "supervised_tokens", "rows", "base"}
    assert set(result["base"]) == {"loss", "perplexity", "supervised_tokens", "rows"}
    assert result["loss"] < result["base"]["loss"]
    alone = json.loads(run("evaluate", "--json", "--no-adapter", cwd=trained).stdout)
    assert alone["base"] is None
    assert abs(alone["loss"] - result["base"]["loss"]) < 1e-6


def test_evaluate_takes_the_rows_that_the_run_was_trained_on(tmp_path):
    rows = [{"question": f"第{number}条", "answer": "换水" * (number % 7 + 20)} for number in range(60)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("--model", "tiny", "--data", "mine.jsonl", "--iters", "1", "--max-seq-length", "30")
    assert run("train", *own, cwd=tmp_path).returncode == 0
    done = run("evaluate", "--split", "all", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["rows"] == 60
    assert "mine.jsonl, all: 60 rows" in done.stderr
    assert "longer than --max-seq-length 30 and were truncated" in done.stderr


def test_the_base_alone_may_be_any_model(trained, tmp_path):
    """An adapter in the folder, of another model, is no reason to refuse `--no-adapter`."""
    model = tmp_path / "other"
    tiny_folders.write_folder(model)
    done = run("generate", "-p", "鱼", "--no-adapter", "--model", str(model), "--max-tokens", "2", cwd=trained)
    assert done.returncode == 0, done.stderr


def test_generate_answers_on_stdout_alone(trained):
    done = run("generate", "-p", "金鱼为什么容易浮头？", "--max-tokens", "20", cwd=trained)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    streamed = done.stdout.strip()
    done = run("generate", "-p", "金鱼为什么容易浮头？", "--max-tokens", "20", "--json", "--compare", cwd=trained)
    result = json.loads(done.stdout)
    assert result["answer"].strip() == streamed
    assert result["base"] != result["answer"]


def test_a_file_of_questions(trained):
    questions = ROOT / "data" / "questions.txt"
    done = run(
        "generate",
        "--questions",
        str(questions),
        "--out",
        "answers.jsonl",
        "--max-tokens",
        "8",
        "--compare",
        cwd=trained,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (trained / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["question"] for row in rows] == [
        line for line in questions.read_text(encoding="utf-8").splitlines() if line
    ]
    assert all(set(row) == {"question", "answer", "base"} for row in rows)


def test_fused_equals_adapter(trained):
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from mlx_fish.inference.session import load_session

    done = run("fuse", "--to-hf", "--dtype", "float32", cwd=trained)
    assert done.returncode == 0, done.stderr
    ids = np.arange(5, 60, dtype=np.int32)
    backend = load_session(model="tiny", adapter=trained / "finetuned_model", no_adapter=False).load()
    fused = AutoModelForCausalLM.from_pretrained(trained / "fused_model")
    with torch.no_grad():
        expected = fused(torch.tensor(ids[None]).long()).logits[0].numpy()
    assert np.abs(backend.logits(ids) - expected).max() < 1e-4


def test_peft_loads_the_adapter_whole(trained):
    """Exactly our keys, our logits, and merged our fused model."""
    import warnings

    import numpy as np
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    from mlx_fish.adapters.peft import load_adapter
    from mlx_fish.inference.session import load_session
    from mlx_fish.models.hub import find_model

    folder = trained / "finetuned_model"
    plain = AutoModelForCausalLM.from_pretrained(find_model("tiny").path, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT goes on without them
        tuned = PeftModel.from_pretrained(plain, folder).eval()
    assert set(get_peft_model_state_dict(tuned, save_embedding_layers=False)) == set(load_adapter(folder).arrays)
    ids = np.arange(5, 60, dtype=np.int32)
    ours = load_session(model="tiny", adapter=folder, no_adapter=False).load().logits(ids)
    with torch.no_grad():
        assert np.abs(tuned(torch.tensor(ids[None]).long()).logits[0].numpy() - ours).max() < 1e-4
    done = run("fuse", "--to-hf", "--dtype", "float32", "--out", "for_peft", cwd=trained)
    assert done.returncode == 0, done.stderr
    fused = AutoModelForCausalLM.from_pretrained(trained / "for_peft", dtype=torch.float32).state_dict()
    for name, tensor in tuned.merge_and_unload().state_dict().items():
        torch.testing.assert_close(fused[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_dry_run_writes_nothing(tmp_path):
    done = run("train", "--model", "tiny", "--iters", "3", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trainable" in done.stderr
    assert not list(tmp_path.iterdir())


def test_yaml_settings_and_flags(tmp_path):
    (tmp_path / "run.yaml").write_text("model_name_or_path: tiny\nmax_steps: 5\nlearning_rate: 1e-3\n")
    done = run("train", "--config", "run.yaml", "--iters", "2", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 updates" in done.stderr
    assert "learning rate 0.001" in done.stderr
