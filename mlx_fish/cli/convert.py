"""Define `mlx-fish convert`: convert a model to an MLX folder."""

import shlex
from pathlib import Path

import click

from mlx_fish.cli.options import DTYPES, first_given_flag
from mlx_fish.tracking.events import say
from mlx_fish.tracking.terminal import byte_bar, size_text


@click.command()
@click.option(
    "--model",
    help="Model to convert: a Hub id, a Hugging Face folder, a .gguf file, or `tiny` (built in).  [default: Qwen/Qwen2-0.5B]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Output folder.  [default: models/<name>-mlx]")
@click.option("--dtype", type=DTYPES, help="Dtype of the weights.  [default: the source's dtype]")
@click.option(
    "-q",
    "--quantize",
    "bits",
    type=click.Choice(["4", "8"]),
    help="Quantise the weights to this number of bits (requires MLX).",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="With -q: number of weights that share one scale.",
)
@click.option("--overwrite", is_flag=True, help="Replace the output folder if mlx-fish wrote it.")
def convert(
    model: str | None, out: Path | None, dtype: str | None, bits: str | None, group_size: str, overwrite: bool
) -> None:
    """Convert a Hugging Face model or a GGUF file to an MLX folder."""
    if bits is None and first_given_flag("group_size"):
        raise click.UsageError("--group-size requires -q 4 or -q 8.")
    from mlx_fish.backends.choose import load_quantizer
    from mlx_fish.models.convert import convert as run

    with byte_bar("converting") as progress:
        result = run(
            model=model,
            out=out,
            dtype=dtype,
            quantizer=load_quantizer(int(bits), int(group_size)) if bits else None,
            overwrite=overwrite,
            progress=progress,
        )
    size = f"{result.num_parameters / 1e6:.1f} M parameters, {result.dtype}"
    if bits:
        size += f", quantised to {bits} bits"
    say(f"{result.path}: {size}, {size_text(result.num_bytes)}, {result.seconds:.1f} s")
    say(f"\nNext:\n  mlx-fish train --model {shlex.quote(str(result.path))} --iters 10")
