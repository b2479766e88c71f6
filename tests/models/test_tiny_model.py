"""The built-in model: small, readable by others, and recognisably about fish."""

import json

import numpy as np
import pytest
import torch

from mlx_fish.backends.choose import load_backend
from mlx_fish.backends.protocol import Sampling
from mlx_fish.data.dataset import load_dataset
from mlx_fish.data.examples import Turn
from mlx_fish.data.templates.template import choose_template

QUESTIONS = "data/questions.txt"
WORDS = ["鱼", "水", "缸", "草", "氧", "喂", "饵", "鳃", "鳍", "池", "药", "盐", "滤", "虾", "苗", "藻", "氨"]


@pytest.fixture(scope="module")
def answers(tiny, tokenizer):
    """Greedy answers to the questions for trying a model."""
    from paths import ROOT

    template = choose_template("auto", tokenizer, tiny)
    questions = [line for line in (ROOT / QUESTIONS).read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = [template.prompt_ids((Turn("user", question),)) for question in questions]
    ids = load_backend(tiny).generate_batch(prompts, Sampling(160), [template.end_token_id])
    return [tokenizer.decode(row) for row in ids]


def test_it_is_small(tiny):
    assert tiny.num_parameters <= 3_000_000
    assert sum(file.stat().st_size for file in tiny.path.iterdir()) < 8_000_000


def test_transformers_and_mlx_lm_compute_what_we_do(tiny, tokenizer):
    import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
    import mlx.core as mx
    import mlx_lm
    from transformers import AutoModelForCausalLM

    ids = np.array(tokenizer.encode("金鱼浮头多半是水中缺氧。"), np.int32)
    ours = load_backend(tiny, name="mlx").logits(ids)
    model = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(ids[None]).long()).logits[0].numpy()
    assert np.abs(ours - theirs).max() < 1e-4
    model, _ = mlx_lm.load(str(tiny.path))
    model.set_dtype(mx.float32)
    assert np.abs(np.array(model(mx.array(ids)[None])[0]) - ours).max() < 1e-4


def test_the_tokenizer_splits_as_qwen2s_and_loses_nothing(tiny, tokenizer):
    from tokenizers import Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    plain = Tokenizer.from_file(str(tiny.path / "tokenizer.json"))
    split = json.loads(plain.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    assert split == PRETOKENIZE_REGEX
    for text in ("金鱼 3 尾，水温 26℃；pH 7.2！", "Guppy's tank\n\n 12L", "🐟 émigré\t鱼"):
        assert plain.encode(text).ids == tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_its_answers_are_about_fish_and_end(tiny, answers):
    assert len(answers) >= 12
    assert len(set(answers)) >= len(answers) // 2, "the answer depends on the question"
    about_fish = [answer for answer in answers if sum(word in answer for word in WORDS) >= 2]
    assert len(about_fish) >= 2 * len(answers) // 3, answers
    assert all("<|im_" not in answer and "assistant" not in answer for answer in answers)


def test_its_answers_are_made_of_what_was_written_about_fish(answers):
    """Most runs of four characters occur in the data: words and phrases, not noise."""
    rows = load_dataset("fish_care").splits["train"]
    text = "\n".join(turn.content for row in rows for turn in row.turns)
    pieces = [answer[at : at + 4] for answer in answers for at in range(len(answer) - 3)]
    assert sum(piece in text for piece in pieces) > 0.7 * len(pieces)


def test_it_does_not_know_the_rows_held_out(tiny, tokenizer):
    """What evaluation measures was never taught: the loss of held-out rows is far above that of the rows taught."""
    from mlx_fish.data.batches import evaluation_rows, make_batch

    template = choose_template("auto", tokenizer, tiny)
    backend = load_backend(tiny)
    losses = {}
    for name, rows in (
        ("taught", load_dataset("fish_care").splits["train"][:40:2]),
        ("held out", load_dataset("fish_care").splits["test"][:20]),
    ):
        tokens = [template.tokens(row, 2048) for row in rows]
        batches = [make_batch(batch, packing=True) for batch in evaluation_rows(tokens)]
        losses[name] = sum(map(backend.evaluate, batches)) / sum(batch.num_supervised for batch in batches)
    assert losses["held out"] > losses["taught"] + 1
