"""Make `mlx_fish/models/tiny`: a toy Qwen2 model of two million parameters, taught from scratch on the project's own fish data.

    python tools/make_tiny_model.py [--steps N] [--out FOLDER]

It serves the demo, the tests and offline first tries, and takes some minutes on two cores. It learns half of the training rows,
as conversations and nearly by heart, since so little text teaches fluency in no other way; the other half is left for
fine-tuning to teach. The validation and test rows are never seen.
"""

import argparse
import math
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mlx_fish.backends.blas import load_openblas  # noqa: E402
from mlx_fish.data.dataset import load_dataset  # noqa: E402
from mlx_fish.data.examples import Example  # noqa: E402
from mlx_fish.models.folder import with_both_rope_forms  # noqa: E402
from mlx_fish.storage.files import new_folder, write_json, write_text  # noqa: E402
from mlx_fish.storage.tensors import write_shards  # noqa: E402

load_openblas()  # before MLX, whose Linux wheel multiplies matrices thirty times slower without it

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import mlx_lm  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from mlx_lm.models import qwen2  # noqa: E402
from mlx_lm.sample_utils import make_sampler  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

DATA = ROOT / "data" / "fish_care_dataset.jsonl"
TINY = ROOT / "mlx_fish" / "models" / "tiny"
QUESTIONS = ("金鱼为什么容易浮头？", "新手适合养什么淡水观赏鱼？", "鱼缸换水的正确频率是多少？")

END_OF_TEXT, START, END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

VOCAB_SIZE = 2560
HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 192, 4, 6, 2, 512  # multiples of 64, MLX's quantisation group
STEPS, BATCH, LENGTH = 800, 8, 160  # some thirty passes
LABEL_SMOOTHING = 0.1  # without it the model is certain of what it knows by heart, and fine-tuning can hardly move it
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 3e-3, 50, 0.1
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny model from data/fish_care_dataset.jsonl.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer updates [default: {STEPS}]")
    parser.add_argument("--out", type=Path, default=TINY, help="folder to write [default: mlx_fish/models/tiny]")
    options = parser.parse_args()
    splits = load_dataset(str(DATA)).splits
    taught = splits["train"][::2]
    start = time.perf_counter()
    tokenizer = train_tokenizer(splits["train"])
    config = model_config(tokenizer)
    model = new_model(config)
    train(model, tokenizer, taught, splits["valid"], options.steps)
    seconds = time.perf_counter() - start
    parts = {"taught": taught, "untaught": splits["train"][1::2], "valid": splits["valid"], "test": splits["test"]}
    losses = {name: answer_loss(model, tokenizer, rows) for name, rows in parts.items()}
    replace = options.out.resolve() == TINY  # no other folder is ever replaced
    with new_folder(options.out, marker="chat_template.jinja", overwrite=replace) as folder:
        write_model(folder, model, config)
        write_tokenizer(folder, tokenizer)
        write_text(folder / "README.md", readme(model, parts, losses, options.steps, seconds))
    report(f"{options.out}: {num_parameters(model):,} parameters, {seconds:.0f} s, loss {losses}")
    for question in QUESTIONS:
        print(f"{question}\n  {sampled_answer(options.out, question)}")


def train_tokenizer(rows: list[Example]) -> Tokenizer:
    """A byte-level BPE that splits as Qwen2's does: any text in, the same text (in NFC) out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    roles = "system\nuser\nassistant\n"  # each becomes one token
    texts = [text for row in rows for text in (*question_and_answer(row), roles)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def question_and_answer(row: Example) -> tuple[str, str]:
    question, answer = row.turns[-2], row.turns[-1]
    return "\n".join(filter(None, (question.content, question.input))), answer.content


def prompt(question: str) -> str:
    return f"{START}user\n{question}{END}\n{START}assistant\n"


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """A Hugging Face config.json."""
    return with_both_rope_forms(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "intermediate_size": MLP,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "bos_token_id": tokenizer.token_to_id(END_OF_TEXT),
            "eos_token_id": tokenizer.token_to_id(END),
            "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
            "torch_dtype": "bfloat16",
            "dtype": "bfloat16",
        }
    )


def new_model(config: dict[str, Any]) -> nn.Module:
    """Random weights: matrices N(0, 1/in), narrower where a block adds to the residual stream (as in GPT-2)."""
    mx.random.seed(SEED)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))

    def start(name: str, array: mx.array) -> mx.array:
        if name.endswith("norm.weight"):
            return mx.ones(array.shape)
        if name.endswith("bias"):
            return mx.zeros(array.shape)
        deviation = 0.02 if "embed_tokens" in name else array.shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= math.sqrt(2 * LAYERS)
        return deviation * mx.random.normal(array.shape)

    model.update(tree_unflatten([(name, start(name, array)) for name, array in tree_flatten(model.parameters())]))
    return model


def train(model: nn.Module, tokenizer: Tokenizer, taught: list[Example], valid_rows: list[Example], steps: int) -> None:
    warmup = min(WARMUP, steps // 2)
    rate = optim.join_schedules(
        [
            optim.linear_schedule(0.0, LEARNING_RATE, warmup),
            optim.cosine_decay(LEARNING_RATE, steps - warmup, LEARNING_RATE / 10),
        ],
        [warmup],
    )
    optimizer = optim.AdamW(rate, betas=[0.9, 0.99], weight_decay=WEIGHT_DECAY, bias_correction=True)
    loss_and_grad = nn.value_and_grad(model, smoothed_loss)
    batches = packed_batches(tokenizer, taught)
    for step in range(1, steps + 1):
        loss, grads = loss_and_grad(model, next(batches))
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        if step % max(1, steps // 10) == 0:
            valid = answer_loss(model, tokenizer, valid_rows)
            report(f"step {step}/{steps}: loss {loss.item():.3f}, valid {valid:.3f}")


def smoothed_loss(model: nn.Module, ids: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], label_smoothing=LABEL_SMOOTHING, reduction="mean")


def packed_batches(tokenizer: Tokenizer, rows: list[Example]) -> Iterator[mx.array]:
    """Endless (BATCH, LENGTH + 1) ids, texts end to end.

    In each pass every conversation comes twice: as it is, and with sentences drawn from all answers in place of its own. The
    second teaches sentences that stand by themselves, so that the model stays fluent where the question is new to it.
    """
    generator = random.Random(SEED)
    pairs = [question_and_answer(row) for row in rows]
    sentences = [sentence for _, answer in pairs for sentence in split_sentences(answer)]
    needed = BATCH * (LENGTH + 1)
    stream: list[int] = []
    while True:
        while len(stream) < needed:
            mixed = [(q, "".join(generator.sample(sentences, len(split_sentences(a))))) for q, a in pairs]
            texts = [f"{prompt(q)}{a}{END}\n{END_OF_TEXT}" for q, a in pairs + mixed]
            generator.shuffle(texts)
            for text in texts:
                stream += tokenizer.encode(text).ids
        yield mx.array(np.array(stream[:needed], np.int32).reshape(BATCH, LENGTH + 1))
        stream = stream[needed:]


def split_sentences(text: str) -> list[str]:
    return [sentence for sentence in re.split(r"(?<=[。！？\n])", text) if sentence]


def answer_loss(model: nn.Module, tokenizer: Tokenizer, rows: list[Example]) -> float:
    """Mean cross-entropy (nats) over the tokens of the answers and their end tokens."""
    total, count = 0.0, 0
    for row in rows:
        question, answer = question_and_answer(row)
        before = tokenizer.encode(prompt(question)).ids
        ids = mx.array([before + tokenizer.encode(answer + END).ids])
        losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])[0, len(before) - 1 :]
        total, count = total + losses.sum().item(), count + losses.size
    return round(total / count, 3)


def write_model(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    weights = dict(tree_flatten(model.parameters()))
    shapes = {name: tuple(array.shape) for name, array in weights.items()}
    write_shards(folder, shapes, lambda name: np.array(weights[name]), dtype="bfloat16")
    write_json(folder / "config.json", config)
    pad, end = config["pad_token_id"], config["eos_token_id"]
    write_json(
        folder / "generation_config.json", {"bos_token_id": pad, "eos_token_id": [end, pad], "pad_token_id": pad}
    )


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    write_text(folder / "chat_template.jinja", CHATML)
    tokens = {"bos_token": None, "eos_token": END, "pad_token": END_OF_TEXT, "unk_token": None}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 2048,
        "add_prefix_space": False,
        "chat_template": CHATML,
    }
    write_json(folder / "tokenizer_config.json", settings | tokens)


def sampled_answer(folder: Path, question: str) -> str:
    """An answer of the folder just written, read back by mlx-lm."""
    mx.random.seed(SEED)
    model, tokenizer = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    text = prompt(question)
    return str(mlx_lm.generate(model, tokenizer, text, max_tokens=120, sampler=make_sampler(temp=0.5))).replace(
        "\n", " "
    )


def num_parameters(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def readme(
    model: nn.Module, parts: dict[str, list[Example]], losses: dict[str, float], steps: int, seconds: float
) -> str:
    return f"""# The tiny model

**A toy. Its advice is worthless: never treat a fish based on it.** It gives the demo, the tests and a first try without a
network a real model of a few megabytes (`--model tiny`). It writes text that sounds like fish keeping, nothing more.

- Architecture: Qwen2, {num_parameters(model):,} parameters ({LAYERS} layers, hidden size {HIDDEN}, {HEADS} heads, {KV_HEADS} key-value heads, tied embedding), stored in
  bfloat16. Tokenizer: a byte-level BPE of {VOCAB_SIZE} tokens with Qwen2's splitting rule. Chat template: ChatML.
- Data: {len(parts["taught"])} of the training rows of `data/fish_care_dataset.jsonl`, both unchanged and with their sentences mixed. The other {len(parts["untaught"])}
  are left for fine-tuning; the {len(parts["valid"])} validation and {len(parts["test"])} test rows were not trained on.
- Training: {steps} updates of {BATCH} x {LENGTH} tokens, AdamW, {seconds:.0f} s on two CPU cores. Loss on answers (nats per token; a uniform guess has
  {math.log(VOCAB_SIZE):.2f}): trained rows {losses["taught"]:.2f}, held-out rows {losses["untaught"]:.2f}, valid {losses["valid"]:.2f}, test {losses["test"]:.2f}. The model has nearly memorised the rows it was trained on.
  On everything else it is confident and wrong, and fine-tuning corrects part of that.
- Made by `python tools/make_tiny_model.py`; rerun it when the data changes.
- Licence: MIT, like the project.
"""


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
