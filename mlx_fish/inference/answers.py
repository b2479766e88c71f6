"""Generate answers: streamed for one question, or batched for a file of questions (`mlx-fish generate`)."""

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
    """Return the conversation that asks one question.

    Args:
        input: additional input for the question.
        system: system prompt.

    Raises:
        FishError: the question is empty.
    """
    if not question.strip():
        raise FishError("-p is empty; expected a question.")
    system_turns = (Turn("system", system),) if system else ()
    return (*system_turns, Turn("user", question, input))


def stream(session: Session, backend: Backend, turns: tuple[Turn, ...], sampling: Sampling) -> Iterator[str]:
    """Yield the answer in pieces of text as it is generated. A character is yielded once all of its bytes are complete."""
    ids: list[int] = []
    yielded_text = ""
    for token in backend.generate(session.template.prompt_ids(turns), sampling, session.end_ids):
        ids.append(token)
        text = session.template.answer_text(ids)
        if text.startswith(yielded_text):
            yield text[len(yielded_text) :]
            yielded_text = text


def read_questions(path: Path) -> list[str]:
    """Read a file with one question per line; blank lines are skipped.

    Raises:
        FishError: the file cannot be read, is not UTF-8, or has no questions.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise FishError(f"cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise FishError(f"{path} is not UTF-8; save it as UTF-8.") from error
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise FishError(f"{path} contains no questions; expected one per line.")
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
    """Answer all questions in one batch.

    Args:
        system: system prompt.
        compare: also answer with the adapter disabled.

    Returns:
        `{"question": …, "answer": …}` for each question, with `compare` also `"base"`.
    """
    prompts = [session.template.prompt_ids(turns_of(question, system=system)) for question in questions]

    def generate_answers() -> list[str]:
        outputs = backend.generate_batch(prompts, sampling, session.end_ids)
        return [session.template.answer_text(ids).strip() for ids in outputs]

    rows: list[dict[str, Any]] = [
        {"question": question, "answer": answer} for question, answer in zip(questions, generate_answers(), strict=True)
    ]
    if compare:
        backend.use_adapter(False)
        for row, answer in zip(rows, generate_answers(), strict=True):
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
    """Return the greedy answer to a conversation on one line, with a final `…` if it was truncated at `max_tokens`."""
    prompt = template.prompt_ids(turns)
    ids = list(backend.generate(prompt, Sampling(max_tokens=max_tokens), end_ids))
    text = template.answer_text(ids).strip().replace("\n", " ")
    return text + ("…" if len(ids) == max_tokens else "")


def write_answers(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Write rows as JSON lines to a file, or to stdout if `out` is None."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
