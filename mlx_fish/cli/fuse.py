"""`mlx-fish fuse`."""

from pathlib import Path
from typing import Any

import click

from mlx_fish.cli.options import DTYPES, given
from mlx_fish.tracking.events import say
from mlx_fish.tracking.terminal import byte_bar, size_text

GGUF_TYPES = click.Choice(["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"], case_sensitive=False)


@click.command()
@click.option("--to-hf", is_flag=True, help="A Hugging Face folder (safetensors).")
@click.option(
    "--to-gguf", "gguf_types", type=GGUF_TYPES, multiple=True, help="A GGUF file; may be given several times."
)
@click.option("--to-gguf-adapter", is_flag=True, help="The adapter alone as GGUF, for llama.cpp's --lora.")
@click.option(
    "--to-ollama",
    "ollama",
    is_flag=False,
    flag_value="my-model",
    metavar="[NAME]",
    help="A folder for `ollama create NAME`.",
)
@click.option("--ollama-type", type=GGUF_TYPES, default="q8_0", show_default=True, help="GGUF type for Ollama.")
@click.option("--ollama-adapter", is_flag=True, help="For Ollama: base and adapter in two files, not merged.")
@click.option("--create", is_flag=True, help="Run `ollama create`, and ask the new model one question.")
@click.option("--to-mlx", is_flag=True, help="A folder for mlx-lm.")
@click.option("--mlx-bits", type=click.Choice(["4", "8"]), help="Quantise the folder for mlx-lm (needs MLX).")
@click.option("--to-mlx-adapter", is_flag=True, help="The adapter alone in mlx-lm's layout.")
@click.option("--model", help="Base model.  [default: the one that the adapter was trained on]")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Adapter folder: ours, PEFT's or mlx-lm's.  [default: finetuned_model]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to write; with several targets, a folder each in it.  [default: fused_model, fused_gguf, …]",
)
@click.option("--dtype", type=DTYPES, help="Type of the weights of --to-hf and --to-mlx.  [default: the base's]")
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Read everything back with another program and compare.  [default: for small models]",
)
@click.option("--overwrite", is_flag=True, help="Replace the folder if mlx-fish made it.")
def fuse(
    to_hf: bool, gguf_types: tuple[str, ...], to_gguf_adapter: bool, ollama: str | None, ollama_type: str,
    ollama_adapter: bool, create: bool, to_mlx: bool, mlx_bits: str | None, to_mlx_adapter: bool, model: str | None,
    adapter: Path | None, out: Path | None, dtype: str | None, verify: bool | None, overwrite: bool,
) -> None:  # fmt: skip
    """Merge adapter and base into a plain model, for any number of programs at once."""
    _check_fuse_options(ollama, ollama_adapter, create, to_mlx, mlx_bits, to_hf, dtype)
    from mlx_fish.adapters.peft import load_adapter
    from mlx_fish.export.fuse import fuse as run
    from mlx_fish.export.targets import Target, with_folders
    from mlx_fish.inference.session import adapter_base
    from mlx_fish.runs.card import Tuning
    from mlx_fish.runs.folder import DEFAULT_OUTPUT, find_adapter, read_run

    wanted = [Target("hf", dtype=dtype)] if to_hf else []
    if gguf_types:
        wanted.append(Target("gguf", file_types=tuple(dict.fromkeys(name.lower() for name in gguf_types))))
    if to_gguf_adapter:
        wanted.append(Target("gguf-adapter"))
    if ollama is not None:
        wanted.append(Target("ollama", file_types=(ollama_type.lower(),), name=ollama, as_adapter=ollama_adapter))
    if to_mlx:
        wanted.append(Target("mlx", dtype=dtype, bits=int(mlx_bits) if mlx_bits else None))
    if to_mlx_adapter:
        wanted.append(Target("mlx-adapter"))
    if not wanted:
        raise click.UsageError("name a target: --to-hf, --to-gguf q8_0, --to-ollama or another (see --help).")
    if create:
        from mlx_fish.export.ollama import check_ollama

        check_ollama()
    targets = with_folders(wanted, out)
    found = find_adapter(adapter or DEFAULT_OUTPUT)
    assert found is not None
    base, lora = adapter_base(found, model), load_adapter(found)
    with byte_bar("fusing") as progress:
        result = run(base=base, adapter=lora, targets=targets, overwrite=overwrite, progress=progress)
    say(f"{result.layers} layers merged in {result.seconds:.1f} s")
    if result.original:
        say(f"the base is quantised, so its original {result.original} was used")
    elif result.expanded:
        say("the base is quantised, so its values were expanded")
    for artifact in result.artifacts:
        say(_told(artifact))
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
    """No option is accepted and ignored."""
    if ollama is None and (create or ollama_adapter):
        raise click.UsageError(f"{'--create' if create else '--ollama-adapter'} goes with --to-ollama.")
    if ollama is None and given("ollama_type"):
        raise click.UsageError("--ollama-type goes with --to-ollama.")
    if mlx_bits and not to_mlx:
        raise click.UsageError("--mlx-bits goes with --to-mlx.")
    if dtype and not (to_hf or to_mlx):
        raise click.UsageError("--dtype goes with --to-hf or --to-mlx; a GGUF file's type is told by --to-gguf.")


def _told(artifact: Any) -> str:
    """One line on what was written, and what of the adapter is left in it."""
    line = f"{artifact.path}: {artifact.dtype}, {size_text(artifact.num_bytes)}"
    if artifact.kept is None:
        return line
    line += (
        f"; {artifact.kept:.1%} of the adapter's change survives, {artifact.changed:.1%} of the adapted weights altered"
    )
    if artifact.kept < 0.95:
        line += (
            f"\n! {artifact.dtype} swallows part of this adapter; float32 (f32 in GGUF) keeps all of it, float16 most"
        )
    return line


def _verify(verify: bool | None, base: Any, adapter: Any, result: Any) -> None:
    """Compare every artifact with the adapter model, as another program reads it."""
    from mlx_fish.export.verify.compare import SMALL, verify_artifacts

    small = base.num_parameters <= SMALL
    if verify is False or (verify is None and not small):
        if verify is None:
            say("not read back, since the model is large; --verify does it")
        return
    verify_artifacts(base, adapter, result.artifacts, required=bool(verify), say=say)
