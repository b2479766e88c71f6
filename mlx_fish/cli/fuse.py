"""Define `mlx-fish fuse`: merge an adapter into its base and export the result."""

from pathlib import Path
from typing import Any

import click

from mlx_fish.cli.options import DTYPES, first_given_flag
from mlx_fish.tracking.events import say
from mlx_fish.tracking.terminal import byte_bar, size_text

GGUF_TYPES = click.Choice(["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"], case_sensitive=False)
_GGUF_METAVAR = "TYPE"  # click would show the choices with dashes: q4-k-m


@click.command()
@click.option("--to-hf", is_flag=True, help="Write a Hugging Face model folder (safetensors).")
@click.option(
    "--to-gguf",
    "gguf_types",
    type=GGUF_TYPES,
    metavar=_GGUF_METAVAR,
    multiple=True,
    help="Write a GGUF file of this type: f32, f16, bf16, q8_0, q4_0 or q4_k_m. Repeat the flag for several files.",
)
@click.option("--to-gguf-adapter", is_flag=True, help="Write only the adapter as GGUF, for llama.cpp's --lora.")
@click.option(
    "--to-ollama",
    "ollama",
    is_flag=False,
    flag_value="my-model",
    metavar="[NAME]",
    help="Write a folder for `ollama create NAME`: a GGUF file and a Modelfile.  [default NAME: my-model]",
)
@click.option(
    "--ollama-type",
    type=GGUF_TYPES,
    metavar=_GGUF_METAVAR,
    default="q8_0",
    show_default=True,
    help="With --to-ollama: GGUF type, see --to-gguf.",
)
@click.option(
    "--ollama-adapter",
    is_flag=True,
    help="With --to-ollama: write base and adapter to separate files instead of merging them.",
)
@click.option(
    "--create", is_flag=True, help="With --to-ollama: run `ollama create`, then ask the new model one question."
)
@click.option("--to-mlx", is_flag=True, help="Write a model folder for mlx-lm.")
@click.option(
    "--mlx-bits",
    type=click.Choice(["4", "8"]),
    help="With --to-mlx: quantise the weights to this number of bits (requires MLX).",
)
@click.option("--to-mlx-adapter", is_flag=True, help="Write only the adapter, in mlx-lm's format.")
@click.option("--model", help="Base model.  [default: the one the adapter was trained on]")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Adapter folder, written by mlx-fish, PEFT or mlx-lm.  [default: finetuned_model]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Output folder; with several targets, each has a subfolder.  [default: fused_model, fused_gguf, …]",
)
@click.option(
    "--dtype", type=DTYPES, help="With --to-hf and --to-mlx: dtype of the weights.  [default: the base's dtype]"
)
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Read the results back with other programs (transformers, PEFT, mlx-lm, llama.cpp) and compare their answers.  "
    "[default: only for small models]",
)
@click.option("--overwrite", is_flag=True, help="Replace the output folders if mlx-fish wrote them.")
def fuse(
    to_hf: bool, gguf_types: tuple[str, ...], to_gguf_adapter: bool, ollama: str | None, ollama_type: str,
    ollama_adapter: bool, create: bool, to_mlx: bool, mlx_bits: str | None, to_mlx_adapter: bool, model: str | None,
    adapter: Path | None, out: Path | None, dtype: str | None, verify: bool | None, overwrite: bool,
) -> None:  # fmt: skip
    """Merge the adapter into the base and export the result.

    Accepts several targets at once, such as `--to-hf --to-gguf q8_0`, and merges the weights only once. Prints the
    output folders on stdout.
    """
    _check_fuse_options(ollama, ollama_adapter, create, to_mlx, mlx_bits, to_hf, dtype)
    from mlx_fish.adapters.peft import load_adapter
    from mlx_fish.export.fuse import fuse as run
    from mlx_fish.export.targets import Target, with_folders
    from mlx_fish.inference.session import adapter_base
    from mlx_fish.runs.card import Tuning
    from mlx_fish.runs.folder import DEFAULT_OUTPUT, find_adapter, read_run

    requested = [Target("hf", dtype=dtype)] if to_hf else []
    if gguf_types:
        requested.append(Target("gguf", file_types=tuple(dict.fromkeys(name.lower() for name in gguf_types))))
    if to_gguf_adapter:
        requested.append(Target("gguf-adapter"))
    if ollama is not None:
        requested.append(Target("ollama", file_types=(ollama_type.lower(),), name=ollama, as_adapter=ollama_adapter))
    if to_mlx:
        requested.append(Target("mlx", dtype=dtype, bits=int(mlx_bits) if mlx_bits else None))
    if to_mlx_adapter:
        requested.append(Target("mlx-adapter"))
    if not requested:
        raise click.UsageError("choose a target, such as --to-hf, --to-gguf q8_0 or --to-ollama (see --help).")
    if create:
        from mlx_fish.export.ollama import check_ollama

        check_ollama()
    targets = with_folders(requested, out)
    adapter_path = find_adapter(adapter or DEFAULT_OUTPUT)
    assert adapter_path is not None
    base, lora = adapter_base(adapter_path, model), load_adapter(adapter_path)
    with byte_bar("fusing") as progress:
        result = run(base=base, adapter=lora, targets=targets, overwrite=overwrite, progress=progress)
    say(f"{result.layers} layers merged in {result.seconds:.1f} s")
    if result.original:
        say(f"the base is quantised; the adapter was merged into its original, {result.original}")
    elif result.expanded:
        say("the base is quantised; its weights were dequantised before the merge")
    for artifact in result.artifacts:
        say(_summary(artifact))
    _verify(verify, base, lora, result)
    for target in targets:
        if target.kind == "ollama" and create:
            from mlx_fish.export.ollama import create_model

            question = Tuning.from_run(read_run(lora.path), base=base.name).question
            say(f"\n{question}\n{create_model(target.out, target.name, question)}")
        click.echo(str(target.out))


def _check_fuse_options(
    ollama: str | None,
    ollama_adapter: bool,
    create: bool,
    to_mlx: bool,
    mlx_bits: str | None,
    to_hf: bool,
    dtype: str | None,
) -> None:
    """Reject options that would have no effect."""
    if ollama is None and (create or ollama_adapter):
        raise click.UsageError(f"{'--create' if create else '--ollama-adapter'} requires --to-ollama.")
    if ollama is None and first_given_flag("ollama_type"):
        raise click.UsageError("--ollama-type requires --to-ollama.")
    if mlx_bits and not to_mlx:
        raise click.UsageError("--mlx-bits requires --to-mlx.")
    if dtype and not (to_hf or to_mlx):
        raise click.UsageError("--dtype requires --to-hf or --to-mlx; --to-gguf sets the type of a GGUF file.")


def _summary(artifact: Any) -> str:
    """Return a line on a written artifact, and on how much of the adapter its dtype keeps."""
    line = f"{artifact.path}: {artifact.dtype}, {size_text(artifact.num_bytes)}"
    if artifact.kept is None:
        return line
    line += f"; {artifact.kept:.1%} of the adapter's change kept, {artifact.changed:.1%} of the adapted weights changed"
    if artifact.kept < 0.95:
        line += f"\n! {artifact.dtype} rounds away part of this adapter; float32 (f32 in GGUF) keeps all of it, float16 most"
    return line


def _verify(verify: bool | None, base: Any, adapter: Any, result: Any) -> None:
    """Compare every artifact, as read by another program, with the base plus adapter."""
    from mlx_fish.export.verify.compare import SMALL, verify_artifacts

    small = base.num_parameters <= SMALL
    if verify is False or (verify is None and not small):
        if verify is None:
            say("not verified, because the model is large; use --verify to read the results back")
        return
    verify_artifacts(base, adapter, result.artifacts, required=bool(verify), say=say)
