"""Checkpoints: whole or not at all, the last k kept. Knows nothing of how the arrays came about.

checkpoints/step-00000010/   adapter_model.safetensors  adapter_config.json  optimizer.safetensors  state.json  manifest.json
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from mlx_fish.adapter import Arrays, save_adapter
from mlx_fish.files import new_folder, read_json, write_json
from mlx_fish.tensors import write_safetensors

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    adapter: Arrays,
    adapter_config: dict[str, Any],
    optimizer: Arrays,
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write `folder/step-N` with a sha256 of every file, then remove all but the newest `keep`."""
    target = folder / f"step-{step:08d}"
    with new_folder(target, marker=MANIFEST, overwrite=True) as beside:
        save_adapter(beside, adapter, adapter_config)
        write_safetensors(beside / "optimizer.safetensors", optimizer)
        write_json(beside / "state.json", {"step": step, **state})
        sums = {file.name: _sha256(file) for file in sorted(beside.iterdir())}
        write_json(beside / MANIFEST, {"step": step, "sha256": sums})
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint whose files all have the sums of its manifest."""
    return next((path for path in reversed(checkpoints(folder)) if is_valid(path)), None)


def is_valid(checkpoint: Path) -> bool:
    """Every file that the manifest names is there, unchanged."""
    try:
        sums = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        return all(Path(name).name == name and _sha256(checkpoint / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_state(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint / "state.json")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
