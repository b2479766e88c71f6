"""Define the options that several commands share, and derive the options of `train` from TrainConfig."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mlx_fish.config import BACKENDS, TrainConfig, flag_name, kind_of, read_yaml

DTYPES = click.Choice(["float32", "float16", "bfloat16"])
backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    help="Framework to compute with. auto: $MLX_FISH_BACKEND if set, else MLX on Apple silicon and torch elsewhere, "
    "or whichever is installed.  [default: auto]",
)


def train_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add one option for each field of TrainConfig. An omitted flag stays None, so that a YAML file can set it."""
    for item in reversed(dataclasses.fields(TrainConfig)):
        kind, help_text = kind_of(item), item.metadata["help"]
        if item.default is not None and kind is not bool and "[default" not in help_text:
            help_text += f"  [default: {item.default:g}]" if kind is float else f"  [default: {item.default}]"
        flags = [flag_name(item.name), *(flag_name(name) for name in item.metadata["aliases"])]
        choices, flag_value = item.metadata["choices"], item.metadata["flag_value"]
        if kind is bool:
            if item.default:
                flags[0] += f"/--no-{flags[0].removeprefix('--')}"
            option = click.option(*flags, item.name, is_flag=True, default=None, help=help_text)
        elif flag_value:
            option = click.option(
                *flags, item.name, type=click.Choice(choices), is_flag=False, flag_value=flag_value, help=help_text
            )
        else:
            option = click.option(*flags, item.name, type=click.Choice(choices) if choices else kind, help=help_text)
        command = option(command)
    return click.option(
        "--config", "config_file", type=click.Path(path_type=Path), help="YAML file with settings. Flags override it."
    )(command)


def train_settings(config_file: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a YAML file, overridden by the flags that were given."""
    settings = read_yaml(config_file) if config_file else {}
    return settings | {name: value for name, value in flags.items() if value is not None}


def first_given_flag(*names: str) -> str | None:
    """Return the first flag on the command line that sets one of these parameters, or None if all were omitted."""
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name in names and context.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT:
            return parameter.opts[-1]
    return None


def memory_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Parse a memory size: `16GB` -> bytes."""
    from mlx_fish.planning.machine import parse_memory

    try:
        return None if value is None else parse_memory(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a size; expected a value such as 16GB.") from error
