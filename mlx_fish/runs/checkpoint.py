"""Checkpoints: whole or not at all, the last k kept. Knows nothing of how the arrays came about.

checkpoints/step-00000010/   adapter_model.safetensors  adapter_config.json  optimizer.safetensors  state.json  manifest.json
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
    """What a checkpoint holds: PEFT's arrays, AdamW's moments, and the loop's own state after `step` updates."""

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
    """Write `folder/step-N` with a sha256 of every file, then remove all but the newest `keep`.

    Args:
        after: the step of this run's last checkpoint. What lies between it and this one, or beyond, was damaged, or belongs to a
            course that was given up when the run went back behind it.
    """
    target = folder / f"step-{step:08d}"
    if target.exists() and damage(target):
        shutil.rmtree(target, ignore_errors=True)
    with new_folder(target, marker=MANIFEST, overwrite=True) as beside:
        save_adapter(beside, adapter, adapter_config)
        write_safetensors(beside / OPTIMIZER_FILE, optimizer)
        write_json(beside / STATE_FILE, {"step": step, **state})
        sums = {file.name: _sha256(file) for file in sorted(beside.iterdir())}
        write_json(beside / MANIFEST, {"step": step, "sha256": sums})
    kept = [path for path in checkpoints(folder) if step_of(path) <= after or path == target][-keep:]
    for path in checkpoints(folder):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return target


def load_checkpoint(checkpoint: Path) -> Checkpoint:
    """Read a checkpoint that `damage` found nothing wrong with."""
    state = read_json(checkpoint / STATE_FILE)
    return Checkpoint(step_of(checkpoint), _read(checkpoint / WEIGHTS_FILE), _read(checkpoint / OPTIMIZER_FILE), state)


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_valid(folder: Path, *, before: int | None = None) -> Path | None:
    """The newest checkpoint (of a step below `before`, if given) whose files all have the sums of its manifest."""
    found = [path for path in checkpoints(folder) if before is None or step_of(path) < before]
    return next((path for path in reversed(found) if damage(path) is None), None)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: the first file that is not as its manifest says. None: it is whole."""
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
    """A checkpoint by its name (`step-00000010`), its number or its path.

    Raises:
        FishError: there is none, or it is damaged.
    """
    wanted = f"step-{int(name):08d}" if re.fullmatch(r"\d{1,8}", name, re.ASCII) else Path(name).name
    found = checkpoints(folder)
    checkpoint = next((path for path in found if path.name == wanted), None)
    if checkpoint is None:
        there = f"it has {', '.join(path.name for path in found)}" if found else "it has no checkpoints"
        raise FishError(f"--resume {name}: there is no such checkpoint in {folder.parent} ({there}).")
    if wrong := damage(checkpoint):
        raise FishError(
            f"--resume {name}: {checkpoint} is damaged ({wrong}); use --resume alone for the newest whole one."
        )
    return checkpoint


def _read(path: Path) -> Arrays:
    weights = Weights(read_header(path)[0])
    return {name: weights.read(name) for name in weights}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
