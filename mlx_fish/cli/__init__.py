"""The command line: read the options, call one function, print. Each command imports its room inside, so `--help` is quick."""

import errno
import os
import sys
from typing import Any

import click

from mlx_fish import __version__
from mlx_fish.cli.convert import convert
from mlx_fish.cli.evaluate import evaluate
from mlx_fish.cli.fuse import fuse
from mlx_fish.cli.generate import generate
from mlx_fish.cli.plan import plan
from mlx_fish.cli.train import train
from mlx_fish.errors import FishError


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
    mlx-fish train --iters 10              LoRA on the built-in data set; --data takes yours
    mlx-fish generate -p "..."             the tuned model's answer
    mlx-fish fuse --to-hf                  adapter + base -> Hugging Face folder
    """
    if sys.platform == "win32":  # a pipe there has the code page's encoding, which most languages do not fit into
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


for command in (convert, plan, train, generate, evaluate, fuse):
    main.add_command(command)
