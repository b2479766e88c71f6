"""Define `mlx-fish evaluate`: measure the loss on a data set."""

import json
from pathlib import Path

import click

from mlx_fish.cli.options import backend_option


@click.command()
@click.option(
    "--data",
    help="Data set: a file, a folder, or a name in dataset_info.json.  "
    "[default: the adapter's training data, else fish_care]",
)
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test", "all"]),
    default="test",
    show_default=True,
    help="Split to evaluate.",
)
@click.option("--model", help="Base model.  [default: the one the adapter was trained on]")
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="Adapter folder.  [default: finetuned_model, if it exists]"
)
@click.option("--no-adapter", is_flag=True, help="Evaluate only the base model.")
@backend_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def evaluate(
    data: str | None,
    split: str,
    model: str | None,
    adapter: Path | None,
    no_adapter: bool,
    backend: str,
    as_json: bool,
) -> None:
    """Measure loss and perplexity of the base and the tuned model.

    Both are computed over the supervised tokens of the rows: with --stage sft, the answers.
    """
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
