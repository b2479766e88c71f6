"""`mlx-fish generate`."""

import json
from pathlib import Path

import click

from mlx_fish.cli.options import backend_option, given
from mlx_fish.errors import FishError
from mlx_fish.tracking.events import say


@click.command()
@click.option("-p", "--prompt", help="The question.")
@click.option("--input", "further", default="", help="Further material for the question.")
@click.option(
    "--questions", type=click.Path(path_type=Path), help="Answer a file of questions, one a line, in one batched pass."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Where the answers to --questions go, as JSON lines.  [default: stdout]",
)
@click.option("--model", help="Base model.  [default: the one that the adapter was trained on]")
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="Adapter folder.  [default: finetuned_model, if it is there]"
)
@click.option("--no-adapter", is_flag=True, help="Answer with the base model.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer.")
@click.option(
    "--temp", type=click.FloatRange(0), default=0.0, show_default=True, help="Temperature; 0 takes the likeliest token."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="With --temp: sample from this share of probability.",
)
@click.option(
    "--top-k",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="With --temp: sample from the k likeliest tokens; 0: all.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1: repeat less; as in transformers.",
)
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="With --temp: the samples' seed.")
@backend_option
@click.option("--system", default="", help="A system prompt.")
@click.option("--compare", is_flag=True, help="Put the base's answer beside the tuned one's.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def generate(
    prompt: str | None, further: str, questions: Path | None, out: Path | None, model: str | None, adapter: Path | None,
    no_adapter: bool, max_tokens: int, temp: float, top_p: float, top_k: int, repetition_penalty: float, seed: int,
    backend: str, system: str, compare: bool, as_json: bool,
) -> None:  # fmt: skip
    """Ask the tuned model."""
    if (prompt is None) == (questions is None):
        raise click.UsageError("give a question with -p, or a file of questions with --questions.")
    if out is not None and questions is None:
        raise click.UsageError("--out goes with --questions.")
    if compare and no_adapter:
        raise click.UsageError("--compare needs the adapter that --no-adapter leaves out.")
    if further and questions is not None:
        raise click.UsageError("--input goes with -p.")
    if as_json and questions is not None:
        raise click.UsageError("--json goes with -p; the answers to --questions are JSON lines anyway.")
    if not temp and (chosen := given("top_p", "top_k", "seed")):
        raise click.UsageError(f"{chosen} chooses among samples; give --temp above 0 too.")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise FishError(f"--out {out}: a file in a folder that exists was expected.")
    from mlx_fish.inference import answers
    from mlx_fish.runs.folder import find_adapter

    asked = answers.read_questions(questions) if questions else []
    turns = answers.turns_of(prompt, input=further, system=system) if prompt is not None else ()
    if compare and find_adapter(adapter) is None:
        raise FishError("--compare needs a tuned model; run `mlx-fish train` first, or name one with --adapter.")
    from mlx_fish.backends.protocol import Sampling
    from mlx_fish.inference.session import load_session

    session = load_session(model=model, adapter=adapter, no_adapter=no_adapter, backend=backend)
    sampling = Sampling(max_tokens, temp, top_p, top_k, repetition_penalty, seed)
    loaded = session.load()
    if asked:
        answers.write_answers(
            answers.answer_many(session, loaded, asked, sampling, system=system, compare=compare), out
        )
        if out:
            say(f"{len(asked)} answers in {out}")
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
