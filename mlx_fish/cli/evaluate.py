"""`mlx-fish evaluate`."""

import json
from pathlib import Path

import click

from mlx_fish.cli.options import backend_option


@click.command()
@click.option(
    "--data", help="A file, a folder, or a data set's name.  [default: what the adapter was trained on, else fish_care]"
)
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
    from mlx_fish.evaluation.loss import evaluate as run

    result = run(data=data, split=split, model=model, adapter=adapter, no_adapter=no_adapter, backend=backend)
    if as_json:
        click.echo(json.dumps(result.as_json()))
        return
    click.echo(f"{'':8}{'loss':>10}{'perplexity':>12}")
    if result.base:
        click.echo(f"{'base':8}{result.base.loss:10.4f}{result.base.perplexity:12.2f}")
    click.echo(f"{'tuned' if result.base else 'base':8}{result.loss:10.4f}{result.perplexity:12.2f}")
    click.echo(f"{result.rows} rows, {result.supervised_tokens} supervised tokens")
