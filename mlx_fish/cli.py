"""The command line: read the options, call one function, print. Each command imports its room inside, so `--help` is quick."""

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_fish import __version__
from mlx_fish.config import BACKENDS, TrainConfig, flag_name, kind_of, read_yaml
from mlx_fish.errors import FishError
from mlx_fish.report import say

DTYPES = click.Choice(["float32", "float16", "bfloat16"])
backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    help="Compute with mlx or torch.  [default: $MLX_FISH_BACKEND, else what suits the machine]",
)


class Group(click.Group):
    """Shows a FishError as one sentence on stderr, exit code 1; `--debug` shows where it came from."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FishError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt as stop:
            ctx.exit(getattr(stop, "exit_code", 130))
        except OSError as error:
            if error.errno != errno.ENOSPC or error.filename:
                raise
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (what could not be written is not tried again at the end)
            click.echo(f"Error: cannot write the answer: {error.strerror}.", err=True)
            ctx.exit(1)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from mlx_fish.errors import did_you_mean

            ctx.fail(f"{error.message.rstrip('.')}.{did_you_mean(args[0], self.commands)}")


def with_dashes(name: str) -> str:
    """`--lora_rank`, as LLaMA-Factory's users type it, is `--lora-rank`."""
    return name.replace("_", "-")


@click.group(cls=Group, context_settings={"token_normalize_func": with_dashes, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-fish")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def main(debug: bool) -> None:
    """Fine-tune a small language model on your own questions and answers, on your own Mac.

    \b
    mlx-fish convert                       Qwen/Qwen2-0.5B -> an MLX folder
    mlx-fish train --iters 10              LoRA on the fish-care data
    mlx-fish generate -p "金鱼为什么浮头？"   the tuned model's answer
    mlx-fish fuse --to-hf                  adapter + base -> Hugging Face folder
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@main.command()
@click.option("--model", help="A Hub id, a Hugging Face folder, `tiny`, or a .gguf file.  [default: Qwen/Qwen2-0.5B]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: models/<name>-mlx]")
@click.option("--dtype", type=DTYPES, help="Type of the weights.  [default: the source's]")
@click.option("-q", "--quantize", "bits", type=click.Choice(["4", "8"]), help="Quantise to so many bits (needs MLX).")
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Weights that share a scale.",
)
@click.option("--overwrite", is_flag=True, help="Replace the folder if mlx-fish made it.")
def convert(
    model: str | None, out: Path | None, dtype: str | None, bits: str | None, group_size: str, overwrite: bool
) -> None:
    """Make an MLX folder of a Hugging Face model or a GGUF file."""
    from mlx_fish.convert import convert as run

    with byte_bar("converting") as progress:
        result = run(
            model=model,
            out=out,
            dtype=dtype,
            quantize_bits=int(bits) if bits else None,
            group_size=int(group_size),
            overwrite=overwrite,
            progress=progress,
        )
    size = f"{result.num_parameters / 1e6:.1f} M parameters, {result.dtype}"
    if bits:
        size += f" in {bits} bits"
    say(f"{result.path}: {size}, {size_text(result.num_bytes)}, {result.seconds:.1f} s")
    say(f"\nNext:\n  mlx-fish train --model {result.path} --iters 10")


def train_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of `train`, made from TrainConfig. A flag left out stays None, so that a YAML file can set it."""
    for item in reversed(dataclasses.fields(TrainConfig)):
        kind, help_text = kind_of(item), item.metadata["help"]
        if item.default is not None and kind is not bool and "[default" not in help_text:
            help_text += f"  [default: {item.default:g}]" if kind is float else f"  [default: {item.default}]"
        flags = [flag_name(item.name), *(flag_name(name) for name in item.metadata["also"])]
        choices, bare = item.metadata["choices"], item.metadata["bare"]
        if kind is bool:
            if item.default:
                flags[0] += f"/--no-{flags[0].removeprefix('--')}"
            option = click.option(*flags, item.name, is_flag=True, default=None, help=help_text)
        elif bare:
            option = click.option(
                *flags, item.name, type=click.Choice(choices), is_flag=False, flag_value=bare, help=help_text
            )
        else:
            option = click.option(*flags, item.name, type=click.Choice(choices) if choices else kind, help=help_text)
        command = option(command)
    return click.option(
        "--config", "config_file", type=click.Path(path_type=Path), help="YAML file of settings; flags override it."
    )(command)


def train_settings(config_file: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """What a YAML file sets, and what flags set above it."""
    settings = read_yaml(config_file) if config_file else {}
    return settings | {name: value for name, value in flags.items() if value is not None}


def memory_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """`16GB` -> bytes."""
    from mlx_fish.machine import parse_memory

    try:
        return None if value is None else parse_memory(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no size; one such as 16GB was expected.") from error


@main.command()
@train_options
@click.option(
    "--memory",
    callback=memory_size,
    metavar="SIZE",
    help="Plan for a machine with so much, such as 16GB.  [default: this one's]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(config_file: Path | None, memory: int | None, as_json: bool, **flags: Any) -> None:
    """Tell what `train` with the same options would take: memory by part, whether it fits, the time."""
    from mlx_fish import plan as room

    found, minis = room.plan(TrainConfig(**train_settings(config_file, flags)), memory=memory)
    click.echo(json.dumps(room.as_json(found, minis)) if as_json else room.text(found, minis))


@main.command()
@train_options
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be trained, and write nothing.")
@click.option(
    "--resume",
    "--resume-from-checkpoint",
    is_flag=False,
    flag_value="newest",
    metavar="[CHECKPOINT]",
    help="Go on with the run in --output-dir, with its own settings, from its newest whole checkpoint or the one named.",
)
@click.option("--force", is_flag=True, help="Train even what `mlx-fish plan` says cannot fit in memory.")
def train(config_file: Path | None, dry_run: bool, resume: str | None, force: bool, **flags: Any) -> None:
    """Tune a model with LoRA; writes a PEFT adapter."""
    settings = train_settings(config_file, flags)
    config = TrainConfig(**settings)
    if resume is not None and config.overwrite:
        raise click.UsageError("--resume goes on with a run, --overwrite replaces it; give one of the two.")
    from mlx_fish import train as room

    if resume is None:
        room.train(config, dry_run=dry_run, force=force)
    else:
        room.resume(settings, resume, dry_run=dry_run, force=force)


@main.command()
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
    help="Sample from this share of probability.",
)
@click.option(
    "--top-k", type=click.IntRange(0), default=0, show_default=True, help="Sample from the k likeliest tokens; 0: all."
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1: repeat less; as in transformers.",
)
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="For sampling.")
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
    from mlx_fish import generate as room
    from mlx_fish.run_folder import find_adapter

    asked = room.read_questions(questions) if questions else []
    turns = room.turns_of(prompt, input=further, system=system) if prompt is not None else ()
    if compare and find_adapter(adapter) is None:
        raise FishError("--compare needs a tuned model; run `mlx-fish train` first, or name one with --adapter.")
    from mlx_fish.backends import Sampling
    from mlx_fish.session import load_session

    session = load_session(model=model, adapter=adapter, no_adapter=no_adapter, backend=backend)
    sampling = Sampling(max_tokens, temp, top_p, top_k, repetition_penalty, seed)
    loaded = session.load()
    if asked:
        room.write_answers(room.answer_many(session, loaded, asked, sampling, system=system, compare=compare), out)
        if out:
            say(f"{len(asked)} answers in {out}")
        return
    answers = {}
    for name in ("base", "tuned") if compare else ("tuned" if session.adapter else "base",):
        if session.adapter is not None:
            loaded.use_adapter(name == "tuned")
        if compare and not as_json:
            click.echo(f"{'' if name == 'base' else chr(10)}[{name}]")
        pieces = []
        for piece in room.stream(session, loaded, turns, sampling):
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
        answers[name] = "".join(pieces)
        if not as_json:
            click.echo()
    if as_json:
        result = {"question": prompt, "answer": answers.get("tuned", answers.get("base"))}
        if compare:
            result["base"] = answers["base"]
        click.echo(json.dumps(result, ensure_ascii=False))


@main.command()
@click.option("--data", help="A file, a folder, or a data set's name.  [default: fish_care]")
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test", "all"]),
    default="test",
    show_default=True,
    help="Rows to use.",
)
@click.option("--model", help="Base model.  [default: the one that the adapter was trained on]")
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="Adapter folder.  [default: finetuned_model, if it is there]"
)
@click.option("--no-adapter", is_flag=True, help="Evaluate the base model alone.")
@backend_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    data: str | None,
    split: str,
    model: str | None,
    adapter: Path | None,
    no_adapter: bool,
    backend: str,
    as_json: bool,
) -> None:
    """Loss and perplexity over supervised tokens, base beside tuned."""
    from mlx_fish.evaluate import evaluate as run

    result = run(data=data, split=split, model=model, adapter=adapter, no_adapter=no_adapter, backend=backend)
    if as_json:
        click.echo(json.dumps(result.as_json()))
        return
    click.echo(f"{'':8}{'loss':>10}{'perplexity':>12}")
    if result.base:
        click.echo(f"{'base':8}{result.base.loss:10.4f}{result.base.perplexity:12.2f}")
    click.echo(f"{'tuned' if result.base else 'base':8}{result.loss:10.4f}{result.perplexity:12.2f}")
    click.echo(f"{result.rows} rows, {result.supervised_tokens} supervised tokens")


GGUF_TYPES = click.Choice(["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"], case_sensitive=False)


@main.command()
@click.option("--to-hf", is_flag=True, help="A Hugging Face folder (safetensors).")
@click.option(
    "--to-gguf", "gguf_types", type=GGUF_TYPES, multiple=True, help="A GGUF file; may be given several times."
)
@click.option("--to-gguf-adapter", is_flag=True, help="The adapter alone as GGUF, for llama.cpp's --lora.")
@click.option(
    "--to-ollama",
    "ollama",
    is_flag=False,
    flag_value="my-model",
    metavar="[NAME]",
    help="A folder for `ollama create NAME`.",
)
@click.option("--ollama-type", type=GGUF_TYPES, default="q8_0", show_default=True, help="GGUF type for Ollama.")
@click.option("--ollama-adapter", is_flag=True, help="For Ollama: base and adapter in two files, not merged.")
@click.option("--create", is_flag=True, help="Run `ollama create`, and ask the new model one question.")
@click.option("--to-mlx", is_flag=True, help="A folder for mlx-lm.")
@click.option("--mlx-bits", type=click.Choice(["4", "8"]), help="Quantise the folder for mlx-lm (needs MLX).")
@click.option("--to-mlx-adapter", is_flag=True, help="The adapter alone in mlx-lm's layout.")
@click.option("--model", help="Base model.  [default: the one that the adapter was trained on]")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Adapter folder: ours, PEFT's or mlx-lm's.  [default: finetuned_model]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to write; with several targets, a folder each in it.  [default: fused_model, fused_gguf, …]",
)
@click.option("--dtype", type=DTYPES, help="Type of the weights of --to-hf and --to-mlx.  [default: the base's]")
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Read everything back with another program and compare.  [default: for small models]",
)
@click.option("--overwrite", is_flag=True, help="Replace the folder if mlx-fish made it.")
def fuse(
    to_hf: bool, gguf_types: tuple[str, ...], to_gguf_adapter: bool, ollama: str | None, ollama_type: str,
    ollama_adapter: bool, create: bool, to_mlx: bool, mlx_bits: str | None, to_mlx_adapter: bool, model: str | None,
    adapter: Path | None, out: Path | None, dtype: str | None, verify: bool | None, overwrite: bool,
) -> None:  # fmt: skip
    """Merge adapter and base into a plain model, for any number of programs at once."""
    _check_fuse_options(ollama, ollama_adapter, create, to_mlx, mlx_bits, to_hf, dtype)
    from mlx_fish.adapter import load_adapter
    from mlx_fish.fuse import fuse as run
    from mlx_fish.run_folder import DEFAULT_OUTPUT, find_adapter
    from mlx_fish.session import base_of
    from mlx_fish.targets import Target, place

    wanted = [Target("hf", dtype=dtype)] if to_hf else []
    if gguf_types:
        wanted.append(Target("gguf", file_types=tuple(dict.fromkeys(name.lower() for name in gguf_types))))
    if to_gguf_adapter:
        wanted.append(Target("gguf-adapter"))
    if ollama is not None:
        wanted.append(Target("ollama", file_types=(ollama_type.lower(),), name=ollama, as_adapter=ollama_adapter))
    if to_mlx:
        wanted.append(Target("mlx", dtype=dtype, bits=int(mlx_bits) if mlx_bits else None))
    if to_mlx_adapter:
        wanted.append(Target("mlx-adapter"))
    if not wanted:
        raise click.UsageError("name a target: --to-hf, --to-gguf q8_0, --to-ollama or another (see --help).")
    if create:
        from mlx_fish.export.ollama import check_ollama

        check_ollama()
    targets = place(wanted, out)
    found = find_adapter(adapter or DEFAULT_OUTPUT)
    assert found is not None
    base, lora = base_of(found, model), load_adapter(found)
    with byte_bar("fusing") as progress:
        result = run(base=base, adapter=lora, targets=targets, overwrite=overwrite, progress=progress)
    say(f"{result.layers} layers merged in {result.seconds:.1f} s")
    if result.original:
        say(f"the base is quantised, so its original {result.original} was used")
    elif result.expanded:
        say("the base is quantised, so its values were expanded")
    for artifact in result.artifacts:
        say(_told(artifact))
    _verify(verify, base, lora, result)
    for target in targets:
        if target.kind == "ollama" and create:
            from mlx_fish.export.ollama import create_model

            answer = create_model(target.out, target.name, QUESTION)
            say(f"\n{QUESTION}\n{answer}")
        click.echo(str(target.out))


QUESTION = "金鱼为什么浮头？"


def _check_fuse_options(
    ollama: str | None,
    ollama_adapter: bool,
    create: bool,
    to_mlx: bool,
    mlx_bits: str | None,
    to_hf: bool,
    dtype: str | None,
) -> None:
    """No option is accepted and ignored."""
    if ollama is None and (create or ollama_adapter):
        raise click.UsageError(f"{'--create' if create else '--ollama-adapter'} goes with --to-ollama.")
    if mlx_bits and not to_mlx:
        raise click.UsageError("--mlx-bits goes with --to-mlx.")
    if dtype and not (to_hf or to_mlx):
        raise click.UsageError("--dtype goes with --to-hf or --to-mlx; a GGUF file's type is told by --to-gguf.")


def _told(artifact: Any) -> str:
    """One line on what was written, and what of the adapter is left in it."""
    line = f"{artifact.path}: {artifact.dtype}, {size_text(artifact.num_bytes)}"
    if artifact.kept is None:
        return line
    line += (
        f"; {artifact.kept:.1%} of the adapter's change survives, {artifact.changed:.1%} of the adapted weights altered"
    )
    if artifact.kept < 0.95:
        line += (
            f"\n! {artifact.dtype} swallows part of this adapter; float32 (f32 in GGUF) keeps all of it, float16 most"
        )
    return line


def _verify(verify: bool | None, base: Any, adapter: Any, result: Any) -> None:
    """Compare every artifact with the adapter model, as another program reads it."""
    from mlx_fish.verify import SMALL, verify_artifacts

    small = base.num_parameters <= SMALL
    if verify is False or (verify is None and not small):
        if verify is None:
            say("not read back, since the model is large; --verify does it")
        return
    verify_artifacts(base, adapter, result.artifacts, required=bool(verify), say=say)


class byte_bar:  # noqa: N801 (used like a function)
    """`with byte_bar("fusing") as progress: … progress(done, total)`: a bar on stderr."""

    def __init__(self, title: str):
        self.title = title

    def __enter__(self) -> Callable[[int, int], None]:
        from tqdm import tqdm

        self.bar = tqdm(
            desc=self.title, unit="B", unit_scale=True, file=sys.stderr, leave=False, mininterval=0.2, disable=None
        )
        return self._progress

    def _progress(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def size_text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
