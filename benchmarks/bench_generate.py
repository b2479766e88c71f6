"""Measure `mlx-fish generate` beside mlx-lm on the same weights and prompts, greedily, and many questions at once beside one by one.

    python benchmarks/bench_generate.py --model DIR --tokens 64 --rounds 3 --json generate.json

Both models are loaded into one process and answer in turn (A B A B), so that whatever else happens on the machine happens to both.
Nobody stops at an end token: each answer has exactly so many tokens, and the texts are compared. Times are those of whole answers,
the prompt's included.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_mlx_lm import load_plain

from mlx_fish.backends.choose import choose_backend, load_backend
from mlx_fish.backends.protocol import Sampling
from mlx_fish.data.dataset import load_dataset
from mlx_fish.data.templates.template import choose_template
from mlx_fish.data.templates.tokenizer import load_tokenizer
from mlx_fish.inference.answers import stream, turns_of
from mlx_fish.inference.session import Session
from mlx_fish.models.hub import find_model

QUESTIONS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hub id or `tiny`")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write every time here")
    options = parser.parse_args()
    choose_backend("mlx")  # before transformers is imported
    folder = find_model(options.model)
    session = EndlessSession(folder, None, choose_template("auto", load_tokenizer(folder), folder), "mlx")
    times, texts = measure(session, questions(), options.tokens, options.rounds)
    agreement = [shared_start(*pair) for pair in zip(texts["mlx-fish"], texts["mlx-lm"], strict=True)]
    if not all(agreement):
        raise SystemExit(f"an answer differs from its first character on: {texts}")
    print(table(times, options.tokens))
    equal = sum(one == other for one, other in zip(texts["mlx-fish"], texts["mlx-lm"], strict=True))
    print(f"\n{equal} of {len(agreement)} texts are equal to mlx-lm's.")
    if options.json:
        record = {
            "settings": {"model": options.model, "tokens": options.tokens},
            "equal_texts": equal,
            "seconds": times,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class EndlessSession(Session):
    """A session whose answers end by their number of tokens alone."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        return ()


def questions() -> list[str]:
    """The questions of the fish data's test split: none of them was trained on."""
    rows = load_dataset("fish_care").splits["test"][:QUESTIONS]
    return [next(turn.content for turn in row.turns if turn.role == "user") for row in rows]


def measure(
    session: Session, asked: Sequence[str], tokens: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Seconds of each way in each round, and the two systems' answers to the same questions."""
    backend = load_backend(session.folder, name="mlx")
    model = load_plain(session.folder)
    from mlx_lm import batch_generate, stream_generate
    from mlx_lm.tokenizer_utils import load as load_mlx_lm_tokenizer

    tokenizer = load_mlx_lm_tokenizer(session.folder.path)
    tokenizer.eos_token_ids = ()
    prompts = [session.template.prompt_ids(turns_of(question)) for question in asked]
    sampling = Sampling(max_tokens=tokens)

    def ours(number: int) -> str:
        return "".join(stream(session, backend, turns_of(asked[number]), sampling))

    def theirs(number: int) -> str:
        return "".join(part.text for part in stream_generate(model, tokenizer, prompts[number], max_tokens=tokens))

    ways: dict[str, Callable[[], Any]] = {
        "mlx-fish": lambda: ours(0),
        "mlx-lm": lambda: theirs(0),
        "mlx-fish, one by one": lambda: [ours(number) for number in range(len(asked))],
        "mlx-fish, at once": lambda: backend.generate_batch(prompts, sampling, ()),
        "mlx-lm, at once": lambda: batch_generate(model, tokenizer, prompts, max_tokens=tokens),
    }
    texts = {"mlx-fish": [ours(number) for number in range(2)], "mlx-lm": [theirs(number) for number in range(2)]}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, answer in ways.items():
            started = time.perf_counter()
            answer()
            times[way].append(time.perf_counter() - started)
    return times, texts


def shared_start(one: str, other: str) -> int:
    """The characters at the start that two texts share: two roundings of a near tie may part them later."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def table(times: dict[str, list[float]], tokens: int) -> str:
    """Markdown: tokens/s of each way (all rounds in brackets), and the two ratios that matter."""
    lines = ["| way | answers | tokens/s |", "|---|---|---|"]
    medians = {way: statistics.median(seconds) for way, seconds in times.items()}
    for way, seconds in times.items():
        number = QUESTIONS if "," in way else 1
        shown = ", ".join(f"{number * tokens / each:.1f}" for each in seconds)
        lines.append(f"| {way} | {number} | {number * tokens / medians[way]:.1f} ({shown}) |")
    beside = medians["mlx-lm"] / medians["mlx-fish"]
    gain = medians["mlx-fish, one by one"] / medians["mlx-fish, at once"]
    return "\n".join([*lines, f"\nBeside mlx-lm: {beside:.2f}. {QUESTIONS} at once beside one by one: {gain:.1f}."])


if __name__ == "__main__":
    main()
