"""Define the command line: each command parses its options, calls one function of the package and prints the result.

The commands import the rest of the package only when they run, so `--help` is fast.
"""

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
    """The command group. It prints a FishError as one sentence on stderr and exits with 1; `--debug` adds the traceback."""

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
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (do not flush the failed output again at exit)
            click.echo(f"Error: cannot write the output: {error.strerror}.", err=True)
            ctx.exit(1)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from mlx_fish.errors import did_you_mean

            ctx.fail(f"{error.message.rstrip('.')}.{did_you_mean(args[0], self.commands)}")


def with_dashes(name: str) -> str:
    """Normalise a flag to dashes, so that LLaMA-Factory's `--lora_rank` is accepted as `--lora-rank`."""
    return name.replace("_", "-")


@click.group(cls=Group, context_settings={"token_normalize_func": with_dashes, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-fish")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Fine-tune a small language model on your own questions and answers, on your own Mac.

    \b
    mlx-fish convert                   convert Qwen/Qwen2-0.5B to an MLX folder
    mlx-fish train --data my.jsonl     train a LoRA adapter; without --data: on the built-in data
    mlx-fish generate -p "..."         ask the fine-tuned model
    mlx-fish fuse --to-hf              merge the adapter into a Hugging Face model folder

    Each command works without further flags: it uses the output of the previous one.
    """
    if sys.platform == "win32":  # pipes use the code page's encoding there, which cannot represent most languages
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


for command in (convert, plan, train, generate, evaluate, fuse):
    main.add_command(command)
