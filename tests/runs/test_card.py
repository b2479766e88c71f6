"""Model cards: front matter that the Hub accepts, nothing of this machine, and snippets that run."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from numpy_backend import NumpyBackend
from runs import SMALL, train

from mlx_fish.runs.card import Tuning, adapter_card, fused_card, license_of, public_name

RUN: dict[str, Any] = {
    "base": {"name": "Qwen/Qwen2-0.5B", "revision": "c540970"},
    "settings": {"lora_rank": 8, "lora_alpha": 16.0, "learning_rate": 2e-4, "epochs": 3.0, "iters": 10, "warmup": 0},
    "template": {"name": "alpaca", "end_token_id": 3},
    "data": {"name": "/home/someone/private/fish.jsonl", "rows": 280},
    "results": {"loss_before": 3.51234, "loss_after": 1.25},
}
HUB = Tuning.from_run(RUN, base="Qwen/Qwen2-0.5B", license="apache-2.0")
LOCAL = Tuning.from_run(RUN, base="/home/someone/models/my-qwen/")


def front_matter(card: str) -> Any:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    return yaml.safe_load(match[1])


def test_front_matter() -> None:
    assert front_matter(adapter_card(HUB)) == {
        "base_model": "Qwen/Qwen2-0.5B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "mlx-fish"],
        "license": "apache-2.0",
    }
    fused = front_matter(fused_card(HUB, dtype="bfloat16"))
    assert (fused["library_name"], fused["base_model_relation"]) == ("transformers", "finetune")


def test_huggingface_hub_reads_it() -> None:
    hub = pytest.importorskip("huggingface_hub")
    for card in (adapter_card(HUB), adapter_card(LOCAL), fused_card(HUB, dtype="float32")):
        data = hub.ModelCard(card).data
        assert data.pipeline_tag == "text-generation"


@pytest.mark.parametrize("card", [adapter_card(LOCAL), fused_card(LOCAL, dtype="float16")], ids=["adapter", "fused"])
def test_a_local_base_is_told_by_its_last_part(card: str) -> None:
    assert "base_model" not in front_matter(card)
    assert "license" not in front_matter(card)
    assert "`my-qwen`" in card and "`fish.jsonl`, 280 rows" in card
    assert "someone" not in card


def test_what_was_trained_is_told() -> None:
    card = adapter_card(HUB)
    assert "validation loss: 3.5123 before, 1.2500 after" in card
    assert "- LoRA rank: 8\n- LoRA alpha: 16.0\n- updates: 10\n" in card
    assert "- warm-up updates: 0\n" in card
    assert "- epochs" not in card  # --iters overrides them
    assert "(revision `c540970`)" in card
    assert "- epochs: 3.0" in adapter_card(Tuning.from_run({"settings": {"epochs": 3.0, "iters": None}}, base="a/b"))


def test_limits_stand_in_every_card() -> None:
    for card in (adapter_card(HUB), fused_card(HUB, dtype="float32")):
        assert "Its answers can be wrong" in card
        assert "可能有误" in card
        assert card.endswith("\n") and "\n\n\n" not in card


def test_fused_card_names_the_dtype() -> None:
    assert "stored in bfloat16" in fused_card(HUB, dtype="bfloat16")


@pytest.mark.parametrize("run", [{}, {"data": [], "base": None, "settings": 3, "results": {"loss_before": "x"}}])
def test_nothing_known_but_the_base(run: dict[str, Any]) -> None:
    card = adapter_card(Tuning.from_run(run, base="tiny"))
    assert "## Training" not in card
    assert "None" not in card


def test_data_name_cannot_break_out_of_its_line() -> None:
    card = adapter_card(Tuning(base="tiny", data="a`\n# Heading"))
    assert "- data: `a' # Heading`" in card


def test_public_name() -> None:
    assert public_name("Qwen/Qwen2-0.5B") == "Qwen/Qwen2-0.5B"
    assert public_name("/tmp/models/fish") == "fish"
    assert public_name("models/x/fish/") == "fish"
    assert public_name("tiny") == "tiny"


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nlicense: apache-2.0\n---\n# x\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: qwen\n---\n", None),
        ("---\nlicense: [mit, x]\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("---\nlicense: 'a\\nb: c'\n---\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_license_of(tmp_path: Path, text: str, license: str | None) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert license_of(tmp_path) == license


def test_license_of_a_folder_without_a_card(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None


def run_snippet(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    match = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert match
    monkeypatch.chdir(folder)
    capsys.readouterr()
    code = match[1].replace("max_new_tokens=256", "max_new_tokens=12")
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    from fuse_models import add_run_files, make_adapter, make_model, run_fuse

    base = make_model(tmp_path / "path" / "to" / "base", "qwen2", tied=True)
    adapter = make_adapter(tmp_path / "adapter", base)
    add_run_files(adapter, base)
    run_fuse(base, adapter, tmp_path / "fused", dtype="float32")
    fused = (tmp_path / "fused" / "README.md").read_text(encoding="utf-8")
    from_fused = run_snippet(fused, tmp_path / "fused", monkeypatch, capsys)
    card = adapter_card(Tuning(base=str(base.path))).replace("path/to/base", str(base.path))
    from_adapter = run_snippet(card, adapter.path, monkeypatch, capsys)
    assert from_fused.strip() and from_fused == from_adapter  # greedy, and the same model


RECIPES = [
    {"question": f"What goes into soup number {i}?", "answer": f"Leeks, {i} potatoes and salt."} for i in range(30)
]


def test_who_tunes_on_recipes_never_meets_a_goldfish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Sample questions come from the data set's own rows, and the card warns of nothing that the data set does not."""
    path = tmp_path / "recipes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in RECIPES), encoding="utf-8")
    train(NumpyBackend(), **{**SMALL, "data": str(path), "output_dir": str(tmp_path / "run")})
    shown = capfd.readouterr().err
    for text in (shown, *(file.read_text() for file in (tmp_path / "run").glob("*.[jm][sd]*"))):
        assert not re.search("鱼|medicine|veterinar|aquari|药", text)
    question = json.loads((tmp_path / "run" / "run.json").read_text())["sample"]["question"]
    assert question in {row["question"] for row in RECIPES}
    assert f"  {question}\n  before: " in shown and shlex.quote(question) in shown
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert shlex.quote(question) in card and json.dumps(question) in card


def test_the_fish_data_bring_their_own_question_and_warning(tmp_path: Path) -> None:
    train(NumpyBackend(), **{**SMALL, "data": "fish_care", "output_dir": str(tmp_path / "run")})
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "金鱼为什么容易浮头？" in card and "with a veterinarian" in card and "必须对照说明书" in card


def test_a_strangers_record_cannot_write_into_a_card() -> None:
    run = {
        "sample": {"question": "a`b\n```\n# Heading\n<script>x</script>\x1b[31m" + "q" * 500},
        "data": {"warning": {"en": "Fine.\n\n# Free money\n[click](http://x)", "zh": 5}},
    }
    card = adapter_card(Tuning.from_run(run, base="Owner/Base"))
    assert "# Heading" not in card and "# Free" not in card and "[click]" not in card and "<script" not in card
    assert "\x1b" not in card and "q" * 201 not in card and card.count("```") == 4
