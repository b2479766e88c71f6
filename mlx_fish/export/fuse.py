"""Fuse an adapter with its base: check that they belong together, merge each tensor once, and hand it to every target.

Every target appears whole or not at all. Runs without a framework, but for a base that MLX quantised (`merge.py`) and a
quantised MLX target. Knows nothing of how a target stores what it is handed (`export/`).
"""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fish import __version__
from mlx_fish.adapters.merge import change_of, changes_anything
from mlx_fish.adapters.peft import Adapter, check_fits
from mlx_fish.errors import FishError
from mlx_fish.export.base import PlainBase, plain_base
from mlx_fish.export.targets import Artifact, Opening, Target, WriterTask, check_target_kind, open_target
from mlx_fish.export.writer import MergedModel
from mlx_fish.models.folder import RECORD, ModelFolder
from mlx_fish.runs.card import Tuning, fused_card, license_of, public_name
from mlx_fish.runs.folder import read_run
from mlx_fish.runs.record import check_base
from mlx_fish.storage.files import check_target, new_folder, read_json
from mlx_fish.storage.tensors import DTYPES, SHARD_BYTES

_BESIDE_BYTES = 64_000_000  # room for what lies beside the weights; a tokenizer takes some 10 MB


@dataclass(frozen=True)
class FuseResult:
    """What was written, and from which values.

    Attributes:
        layers: how many layers were merged.
        expanded: the base was quantised, and its values were expanded.
        original: the base was quantised, and this original was used in its stead.
    """

    artifacts: tuple[Artifact, ...]
    seconds: float
    layers: int
    expanded: bool
    original: Path | None


def fuse(
    *,
    base: ModelFolder,
    adapter: Adapter,
    targets: Sequence[Target],
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> FuseResult:
    """Write base + adapter to every target; each tensor is read and merged once.

    Args:
        progress: called with the bytes written so far and all there are, after each tensor.
        shard_bytes: the most that one safetensors file holds.

    Raises:
        FishError: the adapter does not belong to this base or changes nothing; a target is taken or cannot hold this
            model; too little disk space; a value too large for float16. Then nothing is left of any target.
    """
    started = time.monotonic()
    _check(base, adapter, targets, overwrite)
    values = plain_base(base)
    for target in targets:
        check_target_kind(target, values.config, adapter)
    opening = _opening(base, values, adapter, shard_bytes)
    with ExitStack() as folders:
        tasks: list[WriterTask] = []
        complete: list[Artifact] = []
        for target in targets:
            folder = folders.enter_context(new_folder(target.out, marker=RECORD, overwrite=overwrite))
            begun, done = open_target(target, folder, opening)
            tasks, complete = tasks + begun, complete + done
        _check_space(targets, sum(task.writer.num_bytes for task in tasks))
        _stream(values, adapter, tasks, progress)
    return FuseResult(
        artifacts=(*(task.done() for task in tasks), *complete),
        seconds=time.monotonic() - started,
        layers=len(adapter.spec.layers),
        expanded=values.expanded,
        original=values.path if values.original else None,
    )


def _stream(values: PlainBase, adapter: Adapter, tasks: list[WriterTask], progress: Callable[[int, int], None]) -> None:
    """Every tensor to every writer, one at a time."""
    total, written = sum(task.writer.num_bytes for task in tasks), 0
    for name in values.shapes if tasks else ():
        weight = values.read(name)
        change = change_of(adapter, name, weight)
        merged = weight if change is None else weight + change
        for task in tasks:
            if change is not None and not task.of_base:
                task.survival.add(weight, change, partial(task.writer.as_read, name))
            written += task.writer.put(name, weight if task.of_base else merged)
        progress(written, total)
    for task in tasks:
        task.writer.close()


def _check(base: ModelFolder, adapter: Adapter, targets: Sequence[Target], overwrite: bool) -> None:
    for target in targets:
        check_target(target.out, marker=RECORD, overwrite=overwrite)
        place = target.out.resolve()
        for path, what in ((base.path.resolve(), "base model"), (adapter.path.resolve(), "adapter")):
            if place == path or place in path.parents:
                raise FishError(f"--out {target.out} would replace the {what} in {path}; name another folder.")
    check_fits(adapter, base.linear_layers, base.name)
    check_base(adapter, base.fingerprint, base.name)
    for name, array in (adapter.arrays | adapter.magnitudes).items():
        if not np.isfinite(array).all():
            raise FishError(f"{name} of the adapter {adapter.path} is not finite; use an earlier checkpoint.")
    if not changes_anything(adapter):
        raise FishError(
            f"the adapter {adapter.path} changes nothing: every B A is zero, as before training; train it first."
        )


def _check_space(targets: Sequence[Target], num_bytes: int) -> None:
    place = next(parent for parent in targets[0].out.absolute().parents if parent.is_dir())
    needed, free = num_bytes + _BESIDE_BYTES * len(targets), shutil.disk_usage(place).free
    if free < needed:
        raise FishError(
            f"the fused model takes {needed / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free; "
            "make room, or use another --out."
        )


def _opening(base: ModelFolder, values: PlainBase, adapter: Adapter, shard_bytes: int) -> Opening:
    """What every writer is told before the first tensor."""
    run = read_run(adapter.path)
    template = adapter.path / "chat_template.jinja"
    license_name = license_of(values.path if values.path.is_dir() else base.path)
    public = public_name(base.name)
    model = MergedModel(
        shapes=values.shapes,
        config=values.config,
        generation_config=_generation_config(base, adapter, run),
        tokenizer_folder=adapter.path if (adapter.path / "tokenizer.json").is_file() else base.path,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        name=f"{public.rsplit('/', 1)[-1].removesuffix('.gguf')} tuned",
        base_name=public,
        license=license_name,
        system=_text(run, "template", "system"),
        trained_length=_number(run, "settings", "max_seq_length"),
    )
    tuning = Tuning.from_run(run, base=base.name, license=license_name)
    cards = {dtype: fused_card(tuning, dtype=dtype) for dtype in DTYPES}
    return Opening(model, adapter, cards, _record(base, adapter), values.dtype, shard_bytes)


def _found(run: dict[str, Any], section: str, key: str) -> Any:
    part = run.get(section)
    return part.get(key) if isinstance(part, dict) else None


def _text(run: dict[str, Any], section: str, key: str) -> str | None:
    value = _found(run, section, key)
    return value if isinstance(value, str) and value else None


def _number(run: dict[str, Any], section: str, key: str) -> int | None:
    value = _found(run, section, key)
    return value if isinstance(value, int) and value > 0 else None


def _generation_config(base: ModelFolder, adapter: Adapter, run: dict[str, Any]) -> dict[str, Any]:
    """The adapter's, else the base's, stopping at the tuned template's end token and wherever the base stops."""
    path = adapter.path / "generation_config.json"
    config = read_json(path) if path.is_file() else dict(base.generation_config)
    tuned, own = _found(run, "template", "end_token_id"), config.get("eos_token_id")
    ends = [tuned, *(own if isinstance(own, list) else [own]), *base.end_token_ids]
    unique = list(dict.fromkeys(token for token in ends if isinstance(token, int)))
    if unique:
        config["eos_token_id"] = unique
    for key in ("bos_token_id", "pad_token_id"):
        if config.get(key) is None and base.config.get(key) is not None:
            config[key] = base.config[key]
    return config


def _record(base: ModelFolder, adapter: Adapter) -> dict[str, Any]:
    """mlx_fish.json: names, no paths. No `source` and no fingerprint, since what was fused is a model of its own."""
    return {
        "made_by": "mlx-fish fuse",
        "version": __version__,
        "base": public_name(base.name),
        "revision": base.revision,
        "adapter": adapter.path.resolve().name,
    }
