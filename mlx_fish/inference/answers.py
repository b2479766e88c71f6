"""`mlx-fish generate`: one question streamed, base and tuned side by side, or a file of questions in one batched pass."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_fish.backends.protocol import Backend, Sampling
from mlx_fish.data.examples import Turn
from mlx_fish.data.templates.template import Template
from mlx_fish.errors import FishError
from mlx_fish.inference.session import Session
from mlx_fish.storage.files import write_text

SAMPLE_TOKENS = 32


def turns_of(question: str, *, input: str = "", system: str = "") -> tuple[Turn, ...]:
    """The conversation of one question."""
    if not question.strip():
        raise FishError("-p is empty; a question was expected.")
    opening = (Turn("system", system),) if system else ()
    return (*opening, Turn("user", question, input))


def stream(session: Session, backend: Backend, turns: tuple[Turn, ...], sampling: Sampling) -> Iterator[str]:
    """Yield the answer's text as it comes. A character is held back until all of its bytes are there."""
    ids: list[int] = []
    shown = ""
    for token in backend.generate(session.template.prompt_ids(turns), sampling, session.end_ids):
        ids.append(token)
        text = session.template.answer_text(ids)
        if text.startswith(shown):
            yield text[len(shown) :]
            shown = text


def read_questions(path: Path) -> list[str]:
    """One question a line; blank lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise FishError(f"cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise FishError(f"{path} is not UTF-8; save it as UTF-8.") from error
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise FishError(f"{path} holds no questions; one a line was expected.")
    return questions


def answer_many(
    session: Session,
    backend: Backend,
    questions: list[str],
    sampling: Sampling,
    *,
    system: str = "",
    compare: bool = False,
) -> list[dict[str, Any]]:
    """`{"question", "answer"}` for each question, all in one batched pass; with `compare` also `"base"`, without the adapter."""
    prompts = [session.template.prompt_ids(turns_of(question, system=system)) for question in questions]

    def answers() -> list[str]:
        found = backend.generate_batch(prompts, sampling, session.end_ids)
        return [session.template.answer_text(ids).strip() for ids in found]

    rows: list[dict[str, Any]] = [
        {"question": question, "answer": answer} for question, answer in zip(questions, answers(), strict=True)
    ]
    if compare:
        backend.use_adapter(False)
        for row, answer in zip(rows, answers(), strict=True):
            row["base"] = answer
        backend.use_adapter(True)
    return rows


def sample_answer(
    backend: Backend,
    template: Template,
    turns: tuple[Turn, ...],
    end_ids: tuple[int, ...],
    *,
    max_tokens: int = SAMPLE_TOKENS,
) -> str:
    """The greedy answer to a conversation, on one line; `…` at its end when it was cut at `max_tokens`."""
    prompt = template.prompt_ids(turns)
    ids = list(backend.generate(prompt, Sampling(max_tokens=max_tokens), end_ids))
    text = template.answer_text(ids).strip().replace("\n", " ")
    return text + ("…" if len(ids) == max_tokens else "")


def write_answers(rows: list[dict[str, Any]], out: Path | None) -> None:
    """JSON lines to a file, or to stdout."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
