"""Raw text: every token of a document is learnt once, document ends are kept, and the loss is that of transformers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from mlx_fish.data.batches import make_batch
from mlx_fish.data.dataset import load_dataset
from mlx_fish.data.examples import Example, Mistakes, Turn
from mlx_fish.data.formats.rows import DOCUMENTS
from mlx_fish.data.templates.template import Template
from mlx_fish.errors import FishError
from mlx_fish.objectives import OBJECTIVES
from mlx_fish.objectives.pt import tokenise

TEXT = "水温每天变化不宜超过两度。换水时先把新水放到同一温度，再慢慢加进去。"


@pytest.fixture(scope="module")
def template(tokenizer):
    return Template("empty", tokenizer)


def rows_of(template, text, max_length):
    mistakes = Mistakes()
    rows = tokenise([Example((Turn("document", text),), "a.txt")], template, max_length, mistakes)
    mistakes.refuse()
    return rows


def test_a_document_is_its_ids_and_the_end_token(template, tokenizer):
    (row,) = rows_of(template, TEXT, 2048)
    assert row.ids.tolist() == [*tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_token_id]
    assert row.num_supervised == len(row.ids) - 1, "all but the first, which nothing predicts"
    assert (row.where, row.cut) == ("a.txt", False)


@pytest.mark.parametrize("max_length", [2, 3, 5, 8, 13])
def test_a_long_document_is_learnt_once_and_whole(template, max_length):
    (whole,) = rows_of(template, TEXT, 2048)
    pieces = rows_of(template, TEXT, max_length)
    learnt = [token for piece in pieces for token in piece.ids[1:].tolist()]
    assert learnt == whole.ids[1:].tolist(), "every token is predicted exactly once, in order"
    assert all(len(piece.ids) <= max_length for piece in pieces)
    assert [piece.ids[0] for piece in pieces[1:]] == [piece.ids[-1] for piece in pieces[:-1]]
    assert pieces[-1].where == f"a.txt (part {len(pieces)} of {len(pieces)})"


def test_a_tokenizer_that_adds_bos_has_it_before_every_document(tokenizer):
    class WithBos:
        """The built-in tokenizer, adding its end token in front as Llama's adds BOS."""

        bos_token, bos_token_id = tokenizer.eos_token, tokenizer.eos_token_id

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, text, add_special_tokens=True):
            return [self.bos_token_id] * add_special_tokens + tokenizer.encode(text, add_special_tokens=False)

    ids = Template("empty", WithBos()).document_ids(TEXT, "a")
    assert ids == [tokenizer.eos_token_id, *tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_token_id]


def test_a_document_with_a_control_token_is_a_mistake(template):
    with pytest.raises(FishError, match=r"a.txt: .*<\|endoftext\|>.*control token"):
        rows_of(template, f"{TEXT}<|endoftext|>", 100)


def test_the_loss_is_transformers_over_every_token(tiny, template, backend_name):
    from transformers import AutoModelForCausalLM

    from mlx_fish.backends.choose import load_backend

    rows = rows_of(template, TEXT, 12) + rows_of(template, TEXT[::-1], 2048)
    batch = OBJECTIVES["pt"].collate(rows, packing=True)
    assert batch.num_supervised == batch.num_tokens == sum(len(row.ids) - 1 for row in rows)
    model = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float64)
    expected = 0.0
    for row in rows:
        ids = torch.tensor(row.ids[None]).long()
        with torch.no_grad():
            expected += model(ids, labels=ids).loss.item() * (len(row.ids) - 1)
    assert abs(load_backend(tiny, name=backend_name).evaluate(batch) / expected - 1) < 1e-6


def test_documents_in_jsonl_text_files_and_folders(tmp_path):
    jsonl = tmp_path / "texts.jsonl"
    jsonl.write_text("".join(json.dumps({"text": f"第{i}篇。"}) + "\n" for i in range(40)), encoding="utf-8")
    dataset = load_dataset(str(jsonl), kind=DOCUMENTS)
    assert sum(map(len, dataset.splits.values())) == 40 and len(dataset.splits["valid"]) > 0
    folder = tmp_path / "book"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_bytes(b"\xef\xbb\xbf" * (number % 2) + f"第{number}章\n\n正文。".encode())
    dataset = load_dataset(str(folder), kind=DOCUMENTS)
    texts = {example.turns[0].content for rows in dataset.splits.values() for example in rows}
    assert texts == {f"第{number}章\n\n正文。" for number in range(30)} and len(dataset.hashes) == 30
    alone = load_dataset(str(folder / "07.txt"), kind=DOCUMENTS)
    assert sum(map(len, alone.splits.values())) == 1
    info = tmp_path / "data"
    info.mkdir()
    (info / "dataset_info.json").write_text(
        json.dumps({"c4": {"file_name": "c4.jsonl", "columns": {"prompt": "body"}}})
    )
    (info / "c4.jsonl").write_text('{"body": "一篇文章。"}\n', encoding="utf-8")
    named = load_dataset("c4", kind=DOCUMENTS, found_at=info / "dataset_info.json")
    assert [example.turns[0].content for rows in named.splits.values() for example in rows] == ["一篇文章。"]
    with pytest.raises(FishError, match="needs the columns `prompt` and `response`"):
        load_dataset("c4", found_at=info / "dataset_info.json")


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ('{"question": "a", "answer": "b"}', "pt", "`text` is missing: .*--stage sft"),
        ('{"text": "a"}', "sft", "`text` alone is a document.*--stage pt"),
        ('{"text": "  "}', "pt", "`text` is empty"),
        ('{"text": 5}', "pt", "`text` should be text, not a number"),
        ('["a"]', "pt", "a JSON object was expected, not an array"),
    ],
)
def test_rows_of_the_other_kind_are_named(tmp_path, line, kind, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(FishError, match=rf"rows\.jsonl:1: {words}"):
        load_dataset(str(path), kind=OBJECTIVES[kind].rows)


@pytest.mark.process
def test_the_commands(tmp_path, backend_name):
    """Train on raw text, resume, evaluate, and let the model continue a text; both objectives give one batch the same loss."""

    def fish(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "mlx_fish", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done

    texts = [{"text": f"第{i}篇：{TEXT[i % 7 :]}"} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    settings = ["--stage", "pt", "--model", "tiny", "--data", "texts.jsonl", "--max-seq-length", "16"]
    train = fish("train", *settings, "--iters", "120", "--learning-rate", "5e-3", "--save-every", "20")
    assert "(93% supervised)" in train.stderr, train.stderr
    record = json.loads((tmp_path / "finetuned_model" / "run.json").read_text())
    assert record["template"]["name"] == "empty" and record["settings"]["stage"] == "pt"
    assert record["results"]["loss_after"] < record["results"]["loss_before"] - 1
    assert record["sample"]["question"].startswith("第")
    found = json.loads(fish("evaluate", "--split", "valid", "--json").stdout)
    assert found["loss"] == pytest.approx(record["results"]["loss_after"], rel=1e-5)
    assert found["base"]["loss"] == pytest.approx(record["results"]["loss_before"], rel=1e-5)
    found = json.loads(fish("generate", "-p", "换水时先把新水放", "--compare", "--json", "--max-tokens", "10").stdout)
    assert found["answer"].startswith("到同一温度") and not found["base"].startswith("到同一温度")
    fish("train", "--resume", "--iters", "124")
    fish("fuse", "--to-hf", "--to-ollama", "text", "--no-verify", "--out", "fused")


def test_raw_text_has_no_template():
    from mlx_fish.config import TrainConfig

    with pytest.raises(FishError, match="--template qwen: raw text"):
        TrainConfig(stage="pt", template="qwen")
    with pytest.raises(FishError, match="--stage dpo: expected one of sft, pt"):
        TrainConfig(stage="dpo")


def test_both_objectives_compute_the_same_loss_of_the_same_labels(template):
    """What differs between them is which tokens are labels, not how a label counts."""
    row = rows_of(template, TEXT, 2048)[0]
    batch = make_batch([row])
    log_probs = -np.arange(1.0, len(batch.weights) + 1, dtype=np.float32)
    from mlx_fish.objectives.objective import Labels

    found = {name: OBJECTIVES[name].loss(log_probs, Labels(batch.weights, batch.owners)) for name in OBJECTIVES}
    count = batch.num_supervised
    assert found == {"sft": count * (count + 1) / 2, "pt": count * (count + 1) / 2}
