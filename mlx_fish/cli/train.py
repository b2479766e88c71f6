"""Define `mlx-fish train`: train an adapter, or resume a run."""

from pathlib import Path
from typing import Any

import click

from mlx_fish.cli.options import train_options, train_settings
from mlx_fish.config import TrainConfig


@click.command()
@train_options
@click.option(
    "--dry-run", is_flag=True, help="Check the settings, the data and the memory, print the plan, and write nothing."
)
@click.option(
    "--resume",
    "--resume-from-checkpoint",
    is_flag=False,
    flag_value="newest",
    metavar="[CHECKPOINT]",
    help="Resume the run in --output-dir with its own settings, from its newest valid checkpoint, or from the given one "
    "(name, step number or path). A higher --iters trains longer.",
)
@click.option("--force", is_flag=True, help="Train even if the plan says that the run cannot fit in memory.")
def train(config_file: Path | None, dry_run: bool, resume: str | None, force: bool, **flags: Any) -> None:
    """Fine-tune a model with LoRA and write a PEFT adapter.

    Ctrl-C finishes the current update and saves a checkpoint; `train --resume` continues from there.
    """
    settings = train_settings(config_file, flags)
    config = TrainConfig(**settings)
    if resume is not None and config.overwrite:
        raise click.UsageError("--resume continues a run and --overwrite replaces it; use only one of the two.")
    from mlx_fish.training import train as training

    if resume is None:
        training.train(config, dry_run=dry_run, force=force)
    else:
        training.resume(settings, resume, dry_run=dry_run, force=force)
