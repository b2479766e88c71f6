"""The folder that a training run leaves behind: is it free, whose model does it need."""

import shutil
from pathlib import Path

from mlx_fish.adapter import RUN_FILE, WEIGHTS_FILE, is_adapter
from mlx_fish.errors import FishError, did_you_mean

DEFAULT_OUTPUT = Path("finetuned_model")


def check_free(output: Path, *, overwrite: bool) -> None:
    """Refuse to train over a run, or over what is no run of ours."""
    if not output.exists():
        return
    if not output.is_dir():
        raise FishError(f"--output-dir {output} is a file; name a folder.")
    if not any(output.iterdir()):
        return
    if not (output / RUN_FILE).is_file():
        raise FishError(
            f"--output-dir {output} holds files that are no run of mlx-fish (no {RUN_FILE}); name another folder."
        )
    if not overwrite:
        raise FishError(f"{output} already holds a run; use --overwrite to replace it, or another --output-dir.")


def prepare(output: Path, *, overwrite: bool) -> None:
    """Make the folder, empty."""
    check_free(output, overwrite=overwrite)
    try:
        if output.exists():
            shutil.rmtree(output)
        output.mkdir(parents=True)
    except OSError as error:
        raise FishError(f"cannot write {output}: {error.strerror or error}.") from error


def find_adapter(adapter: Path | None) -> Path | None:
    """The adapter folder asked for, else the default one when a run left it there."""
    if adapter is None:
        return DEFAULT_OUTPUT if (DEFAULT_OUTPUT / WEIGHTS_FILE).is_file() else None
    if not is_adapter(adapter):
        near = (
            [path.parent.name for path in adapter.parent.glob(f"*/{WEIGHTS_FILE}")] if adapter.parent.is_dir() else []
        )
        raise FishError(
            f"--adapter {adapter}: a folder with {WEIGHTS_FILE} and its config was expected; run `mlx-fish train` first."
            f"{did_you_mean(adapter.name, near)}"
        )
    return adapter
