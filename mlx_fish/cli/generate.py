"""Define `mlx-fish generate`: answer questions with a base or fine-tuned model."""

import json
from pathlib import Path

import click

from mlx_fish.cli.options import backend_option, first_given_flag
from mlx_fish.errors import FishError
from mlx_fish.tracking.events import say


@click.command()
@click.option("-p", "--prompt", help="Question to answer.")
@click.option("--input", "context", default="", help="Additional input for the question, such as a text to summarise.")
@click.option(
    "--questions",
    type=click.Path(path_type=Path),
    help="File with one question per line; all are answered in one batch.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="With --questions: file for the answers, as JSON lines.  [default: stdout]",
)
@click.option("--model", help="Base model.  [default: the one the adapter was trained on]")
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="Adapter folder.  [default: finetuned_model, if it exists]"
)
@click.option("--no-adapter", is_flag=True, help="Use only the base model.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Maximum number of tokens in an answer.",
)
@click.option(
    "--temp", type=click.FloatRange(0), default=0.0, show_default=True, help="Sampling temperature; 0: greedy decoding."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="With --temp: nucleus sampling, from the most likely tokens that together have this probability.",
)
@click.option(
    "--top-k",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="With --temp: sample from the k most likely tokens; 0: from all.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Values above 1 reduce repetition, as in transformers.",
)
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="With --temp: random seed.")
@backend_option
@click.option("--system", default="", help="System prompt.")
@click.option("--compare", is_flag=True, help="Answer with both the base and the tuned model.")
@click.option("--json", "as_json", is_flag=True, help="With -p: print the result as one JSON object.")
def generate(
    prompt: str | None, context: str, questions: Path | None, out: Path | None, model: str | None, adapter: Path | None,
    no_adapter: bool, max_tokens: int, temp: float, top_p: float, top_k: int, repetition_penalty: float, seed: int,
    backend: str, system: str, compare: bool, as_json: bool,
) -> None:  # fmt: skip
    """Answer questions with the fine-tuned or the base model.

    Answers go to stdout, everything else to stderr.
    """
    if (prompt is None) == (questions is None):
        raise click.UsageError("give a question with -p, or a file of questions with --questions.")
    if out is not None and questions is None:
        raise click.UsageError("--out requires --questions.")
    if compare and no_adapter:
        raise click.UsageError("--compare needs an adapter; omit --no-adapter.")
    if context and questions is not None:
        raise click.UsageError("--input requires -p.")
    if as_json and questions is not None:
        raise click.UsageError("--json requires -p; the answers to --questions are always JSON lines.")
    if not temp and (sampling_flag := first_given_flag("top_p", "top_k", "seed")):
        raise click.UsageError(f"{sampling_flag} has no effect on greedy decoding; set --temp above 0 too.")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise FishError(f"--out {out}: expected a file in an existing folder.")
    from mlx_fish.inference import answers
    from mlx_fish.runs.folder import find_adapter

    question_list = answers.read_questions(questions) if questions else []
    turns = answers.turns_of(prompt, input=context, system=system) if prompt is not None else ()
    if compare and find_adapter(adapter) is None:
        raise FishError("--compare needs an adapter; run `mlx-fish train` first, or set --adapter.")
    from mlx_fish.backends.protocol import Sampling
    from mlx_fish.inference.session import load_session

    session = load_session(model=model, adapter=adapter, no_adapter=no_adapter, backend=backend)
    sampling = Sampling(max_tokens, temp, top_p, top_k, repetition_penalty, seed)
    loaded = session.load()
    if question_list:
        answers.write_answers(
            answers.answer_many(session, loaded, question_list, sampling, system=system, compare=compare), out
        )
        if out:
            say(f"{len(question_list)} answers written to {out}")
        return
    texts = {}
    for name in ("base", "tuned") if compare else ("tuned" if session.adapter else "base",):
        if session.adapter is not None:
            loaded.use_adapter(name == "tuned")
        if compare and not as_json:
            click.echo(f"{'' if name == 'base' else chr(10)}[{name}]")
        pieces = []
        for piece in answers.stream(session, loaded, turns, sampling):
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
        texts[name] = "".join(pieces)
        if not as_json:
            click.echo()
    if as_json:
        result = {"question": prompt, "answer": texts.get("tuned", texts.get("base"))}
        if compare:
            result["base"] = texts["base"]
        click.echo(json.dumps(result, ensure_ascii=False))
