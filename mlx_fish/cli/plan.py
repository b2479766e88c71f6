"""Define `mlx-fish plan`: predict the memory and time of a training run."""

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
    help="Memory of the machine to plan for, such as 16GB.  [default: this machine's memory]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def plan(config_file: Path | None, memory: int | None, as_json: bool, **flags: Any) -> None:
    """Predict peak memory and time of a training run.

    Accepts the options of `train`, and loads no weights. Shows the peak memory by part, whether the run fits, the
    largest settings that fit, and an estimate of the time.
    """
    from mlx_fish.planning import plan as planning

    here, mac_minis = planning.plan(TrainConfig(**train_settings(config_file, flags)), memory=memory)
    click.echo(json.dumps(planning.as_json(here, mac_minis)) if as_json else planning.text(here, mac_minis))
