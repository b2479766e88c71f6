"""Save and load checkpoints. Writes are atomic, and only the newest checkpoints are kept.

    checkpoints/step-00000010/
      adapter_model.safetensors, adapter_config.json    the adapter, in PEFT's format
      optimizer.safetensors                             AdamW's moments
      state.json                                        the state of the training loop
      manifest.json                                     SHA-256 of the files above

Does not depend on how the arrays are computed.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fish.adapters.formats import CONFIG_FILE
from mlx_fish.adapters.peft import WEIGHTS_FILE, save_adapter
from mlx_fish.adapters.spec import Arrays
from mlx_fish.errors import FishError
from mlx_fish.storage.files import new_folder, read_json, write_json
from mlx_fish.storage.tensors import Weights, read_header, write_safetensors

MANIFEST = "manifest.json"
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_FILES = {WEIGHTS_FILE, CONFIG_FILE, OPTIMIZER_FILE, STATE_FILE}
_NAME = re.compile(r"step-(\d{8})", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint after `step` updates.

    Attributes:
        adapter: the adapter's tensors under PEFT's keys.
        optimizer: AdamW's moments, see `Backend.optimizer_arrays`.
        state: the state of the training loop.
    """

    step: int
    adapter: Arrays
    optimizer: Arrays
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    adapter: Arrays,
    adapter_config: dict[str, Any],
    optimizer: Arrays,
    state: dict[str, Any],
    keep: int = 2,
    after: int = 0,
) -> Path:
    """Write `folder/step-N` with the SHA-256 of every file, then delete all but the newest `keep` checkpoints.

    Args:
        after: step of this run's previous checkpoint. All other checkpoints of later steps are deleted: they are
            damaged, or were abandoned when the run was resumed from an earlier step.

    Returns:
        the checkpoint folder.
    """
    target = folder / f"step-{step:08d}"
    if target.exists() and damage(target):
        shutil.rmtree(target, ignore_errors=True)
    with new_folder(target, marker=MANIFEST, overwrite=True) as new_checkpoint:
        save_adapter(new_checkpoint, adapter, adapter_config)
        write_safetensors(new_checkpoint / OPTIMIZER_FILE, optimizer)
        write_json(new_checkpoint / STATE_FILE, {"step": step, **state})
        sums = {file.name: _sha256(file) for file in sorted(new_checkpoint.iterdir())}
        write_json(new_checkpoint / MANIFEST, {"step": step, "sha256": sums})
    kept = [path for path in checkpoints(folder) if step_of(path) <= after or path == target][-keep:]
    for path in checkpoints(folder):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return target


def load_checkpoint(checkpoint: Path) -> Checkpoint:
    """Load a checkpoint. Call `damage` first: this function does not check the files."""
    state = read_json(checkpoint / STATE_FILE)
    return Checkpoint(step_of(checkpoint), _read(checkpoint / WEIGHTS_FILE), _read(checkpoint / OPTIMIZER_FILE), state)


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint folder's name: `step-00000010` -> 10."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_valid(folder: Path, *, before: int | None = None) -> Path | None:
    """Return the newest undamaged checkpoint, of a step below `before` if that is set, or None."""
    candidates = [path for path in checkpoints(folder) if before is None or step_of(path) < before]
    return next((path for path in reversed(candidates) if damage(path) is None), None)


def damage(checkpoint: Path) -> str | None:
    """Check a checkpoint against its manifest. Return a description of the first damage, or None if it is valid."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        sums = dict(manifest["sha256"])
        if manifest["step"] != step_of(checkpoint) or set(sums) != _FILES:
            return f"{MANIFEST} belongs to another checkpoint"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    for name, digest in sums.items():
        try:
            if _sha256(checkpoint / name) != digest:
                return f"{name} has changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def find_checkpoint(folder: Path, name: str) -> Path:
    """Find a checkpoint by its name (`step-00000010`), its step number or its path.

    Raises:
        FishError: the checkpoint does not exist or is damaged.
    """
    folder_name = f"step-{int(name):08d}" if re.fullmatch(r"\d{1,8}", name, re.ASCII) else Path(name).name
    existing = checkpoints(folder)
    checkpoint = next((path for path in existing if path.name == folder_name), None)
    if checkpoint is None:
        available = f"it has {', '.join(path.name for path in existing)}" if existing else "it has no checkpoints"
        raise FishError(f"--resume {name}: there is no such checkpoint in {folder.parent} ({available}).")
    if problem := damage(checkpoint):
        raise FishError(
            f"--resume {name}: {checkpoint} is damaged ({problem}); use --resume without a value for the newest valid "
            "checkpoint."
        )
    return checkpoint


def _read(path: Path) -> Arrays:
    weights = Weights(read_header(path)[0])
    return {name: weights.read(name) for name in weights}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
