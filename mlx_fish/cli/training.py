"""`mlx-fish convert`, `plan` and `train`."""

import json
import shlex
from pathlib import Path
from typing import Any

import click

from mlx_fish.cli.options import DTYPES, given, memory_size, train_options, train_settings
from mlx_fish.config import TrainConfig
from mlx_fish.report import byte_bar, say, size_text


@click.command()
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
    if bits is None and given("group_size"):
        raise click.UsageError("--group-size goes with -q 4 or -q 8.")
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
    say(f"\nNext:\n  mlx-fish train --model {shlex.quote(str(result.path))} --iters 10")


@click.command()
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


@click.command()
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
