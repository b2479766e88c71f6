"""The Ollama folder: its TEMPLATE gives the ids that training gave, and its other lines say what the model needs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fuse_models import add_run_files, make_adapter, make_model, transformers
from go_render import ollama_prompt

from mlx_fish.data.templates.builtin import BUILT_IN
from mlx_fish.data.templates.template import Template
from mlx_fish.errors import FishError
from mlx_fish.export.fuse import fuse
from mlx_fish.export.go_template import go_template
from mlx_fish.export.modelfile import read_modelfile
from mlx_fish.export.ollama import create_model, parameters, template_of, write_modelfile
from mlx_fish.export.targets import Target
from mlx_fish.export.writer import MergedModel
from mlx_fish.storage.files import read_json, write_json

pytestmark = pytest.mark.process

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
REMINDS = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}{{ messages | length }}"


def conversations() -> list[list[dict[str, str]]]:
    """A score of them: one turn and many, with a system prompt and without, whatever characters people type."""
    questions = [
        "金鱼为什么浮头？",
        'say "hi"',
        "{{ .Content }}",
        "a\n\nb",
        "\u3000全角",
        "24 ℃?",
        "# 1",
        "<think>",
        "x" * 200,
        "\\n",
    ]
    found = []
    for number, question in enumerate(questions):
        other = questions[number - 3]
        turns = [{"role": "user", "content": question}]
        longer = [*turns, {"role": "assistant", "content": other}, {"role": "user", "content": question + other}]
        system = {"role": "system", "content": other}
        found += [[system, *longer] if number % 2 else longer, turns if number % 2 else [system, *turns]]
    return found


def model_with(tokenizer: Any, jinja: str | None, folder: Path, **options: Any) -> MergedModel:
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = {"max_position_embeddings": 32768}
    return MergedModel({}, config, {"eos_token_id": [1, 2]}, folder, chat_template=jinja, **options)


@pytest.mark.parametrize("name", ["chat", *BUILT_IN])
def test_go_template_gives_the_training_ids(name: str, tokenizer: Any, tmp_path: Path) -> None:
    template = Template(name, tokenizer)
    model = model_with(tokenizer, template.jinja, tmp_path / "tokenizer")
    write_modelfile(tmp_path, model, name="fish", file_name="model.gguf")
    commands = read_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8"))
    go_text = next(command.args for command in commands if command.name == "template")
    seen = conversations()
    assert len(seen) == 20
    for messages in seen:
        expected = tokenizer.apply_chat_template(
            messages, chat_template=template.jinja, tokenize=False, add_generation_prompt=True
        )
        found = ollama_prompt(go_text, messages)
        assert tokenizer.encode(found) == tokenizer.encode(expected), messages


def test_the_renderer_can_tell_a_wrong_template(tokenizer: Any, tmp_path: Path) -> None:
    """Negative control: without its end token, the same comparison fails."""
    template = Template("chatml", tokenizer)
    go_text = template_of(model_with(tokenizer, template.jinja, tmp_path), tokenizer).text()
    messages = conversations()[0]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template.jinja, tokenize=False, add_generation_prompt=True
    )
    assert ollama_prompt(go_text, messages) == expected
    assert ollama_prompt(go_text.replace("<|im_end|>", ""), messages) != expected


def test_a_token_that_the_runner_adds_is_left_to_it() -> None:
    def render(messages: Any, add_generation_prompt: bool) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        return transformers.utils.chat_template_utils.render_jinja_template(
            [turns], chat_template=LLAMA3, add_generation_prompt=add_generation_prompt, bos_token="<|begin|>"
        )[0][0]

    found = go_template(render, bos="<|begin|>")
    assert found.prelude == "" and go_template(render).prelude == "<|begin|>"
    text = ollama_prompt(found.text(), [{"role": "user", "content": "hi"}])
    assert text == "<|start|>user<|end|>\n\nhi<|eot|><|start|>assistant<|end|>\n\n"


def test_a_template_that_does_more_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(FishError, match="more than put text around each turn"):
        template_of(model_with(tokenizer, REMINDS, tmp_path), tokenizer)


def test_continuing_an_answer(tokenizer: Any, tmp_path: Path) -> None:
    jinja = Template("chatml", tokenizer).jinja
    go_text = template_of(model_with(tokenizer, jinja, tmp_path), tokenizer).text()
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "half an"}]
    assert ollama_prompt(go_text, messages) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nhalf an"


@pytest.mark.parametrize("system", ["你是一名观赏鱼医生。", 'a """\nb', "你好\u3000世界", "zero\u200bwidth", '"'])
def test_system_prompt_arrives_whole(system: str, tokenizer: Any, tmp_path: Path) -> None:
    jinja = Template("chatml", tokenizer).jinja
    model = model_with(tokenizer, jinja, tmp_path / "tokenizer", system=system)
    write_modelfile(tmp_path, model, name="fish", file_name="model.gguf")
    found = {
        command.name: command.args for command in read_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8"))
    }
    asked = [{"role": "user", "content": "q"}]
    expected = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert ollama_prompt(found["template"], asked, system=found.get("system", "")) == expected


def test_sampling_parameters() -> None:
    generation = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
        "max_new_tokens": 99,
    }
    assert parameters(generation, ["<end>"]) == [
        ("stop", "<end>"), ("temperature", "0.7"), ("top_k", "20"), ("top_p", "0.8"),
        ("repeat_penalty", "1.1"), ("repeat_last_n", "-1"), ("num_predict", "99"),
    ]  # fmt: skip
    assert parameters({}, []) == [("temperature", "0")]  # transformers is greedy unless told
    assert parameters({"do_sample": True}, []) == [("temperature", "1")]


def test_the_folder(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "qwen2", tied=True)
    (base.path / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    adapter = make_adapter(tmp_path / "adapter", base)
    add_run_files(adapter, base)
    run = read_json(adapter.path / "run.json")
    run["template"]["system"] = "你是鱼医生。"
    write_json(adapter.path / "run.json", run)
    target = Target("ollama", tmp_path / "out", file_types=("q8_0",), name="fish", as_adapter=True)
    fuse(base=base, adapter=adapter, targets=[target])
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert "ollama create fish -f Modelfile" in text and "ollama run fish" in text
    found = [(command.name, command.args) for command in read_modelfile(text)]
    assert found[:3] == [("model", "./base-q8_0.gguf"), ("adapter", "./adapter.gguf"), ("system", "你是鱼医生。")]
    assert found[4:] == [
        ("stop", "<end>"), ("stop", "</s>"), ("temperature", "0"), ("num_ctx", "64"), ("license", "apache-2.0"),
    ]  # fmt: skip
    for name in ("base-q8_0.gguf", "adapter.gguf"):
        assert (tmp_path / "out" / name).is_file()
    assert str(tmp_path) not in text


FAKE = """#!{python}
import os, sys
with open(os.environ["FAKE_LOG"], "a") as log:
    print(os.getcwd(), *sys.argv[1:], sep="|", file=log)
if sys.argv[1] == "create":
    assert os.path.isfile("Modelfile")
    print("transferring model data 100%")
    sys.exit(int(os.environ.get("FAKE_EXIT", "0")))
print("因为缺氧。")
"""


@pytest.fixture
def fake_ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `ollama` that writes down how it was called."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ollama"
    program.write_text(FAKE.replace("{python}", sys.executable), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def test_create_runs_ollama_and_asks(tiny: Any, fake_ollama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny, size=1e-2)
    command = [sys.executable, "-m", "mlx_fish", "fuse", "--to-ollama", "me/fish", "--create", "--no-verify"]
    command += ["--model", "tiny", "--adapter", str(adapter.path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert "transferring model data 100%" in done.stderr and "因为缺氧。" in done.stderr
    calls = fake_ollama.read_text(encoding="utf-8").splitlines()
    assert calls[0] == f"{tmp_path / 'out'}|create|me/fish|-f|Modelfile"
    assert calls[1].startswith(f"{tmp_path / 'out'}|run|me/fish|")


def test_create_reports_ollamas_failure(fake_ollama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Modelfile").touch()
    monkeypatch.setenv("FAKE_EXIT", "3")
    with pytest.raises(FishError, match="`ollama create fish` failed with 3"):
        create_model(tmp_path, "fish", "why?")


def test_create_without_ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FishError, match="needs `ollama` on the PATH"):
        create_model(tmp_path, "fish", "why?")
