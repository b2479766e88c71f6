"""`mlx-fish train`."""

from pathlib import Path
from typing import Any

import click

from mlx_fish.cli.options import train_options, train_settings
from mlx_fish.config import TrainConfig


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
    from mlx_fish.training import train as training

    if resume is None:
        training.train(config, dry_run=dry_run, force=force)
    else:
        training.resume(settings, resume, dry_run=dry_run, force=force)
