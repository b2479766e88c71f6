"""`mlx-fish plan`."""

import json
from pathlib import Path
from typing import Any

import click

from mlx_fish.cli.options import memory_size, train_options, train_settings
from mlx_fish.config import TrainConfig


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
    from mlx_fish.planning import plan as planning

    here, mac_minis = planning.plan(TrainConfig(**train_settings(config_file, flags)), memory=memory)
    click.echo(json.dumps(planning.as_json(here, mac_minis)) if as_json else planning.text(here, mac_minis))
