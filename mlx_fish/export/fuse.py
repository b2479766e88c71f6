"""Fuse an adapter with its base: check that they match, merge each tensor once, and pass it to every target.

Writes are atomic: after an error, every target folder is unchanged. Needs a framework only for a base
that MLX quantised (`base.py`) and for a quantised MLX target. Independent of the targets' file formats.
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
from mlx_fish.export.targets import Artifact, ExportContext, Target, WriterTask, check_target_kind, open_target
from mlx_fish.export.writer import MergedModel
from mlx_fish.models.folder import RECORD, ModelFolder
from mlx_fish.runs.card import Tuning, fused_card, license_of, public_name
from mlx_fish.runs.folder import read_run
from mlx_fish.runs.record import check_base
from mlx_fish.storage.files import check_target, new_folder, read_json
from mlx_fish.storage.tensors import DTYPES, SHARD_BYTES

_EXTRA_FILES_BYTES = 64_000_000  # allowance for the files other than the weights; a tokenizer has about 10 MB


@dataclass(frozen=True)
class FuseResult:
    """The result of `fuse`.

    Attributes:
        artifacts: the files and folders that were written.
        seconds: elapsed time.
        layers: number of merged layers.
        expanded: the base was quantised, and its weights were dequantised.
        original: the base was quantised, and the weights of this original model were used instead.
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
    """Merge base and adapter and write every target; each tensor is read and merged once.

    Args:
        overwrite: replace target folders that mlx-fish wrote.
        progress: called after each tensor with the bytes written so far and the total.
        shard_bytes: maximum size of one safetensors file, bytes.

    Raises:
        FishError: the adapter does not belong to this base or changes nothing; a target folder exists, or its
            format does not support this model; the disk is too full; or a value is too large for float16. The
            target folders are then unchanged.
    """
    started = time.monotonic()
    _check(base, adapter, targets, overwrite)
    values = plain_base(base)
    for target in targets:
        check_target_kind(target, values.config, adapter)
    context = _export_context(base, values, adapter, shard_bytes)
    with ExitStack() as folders:
        tasks: list[WriterTask] = []
        finished_artifacts: list[Artifact] = []
        for target in targets:
            folder = folders.enter_context(new_folder(target.out, marker=RECORD, overwrite=overwrite))
            new_tasks, finished = open_target(target, folder, context)
            tasks, finished_artifacts = tasks + new_tasks, finished_artifacts + finished
        _check_space(targets, sum(task.writer.num_bytes for task in tasks))
        _stream(values, adapter, tasks, progress)
    return FuseResult(
        artifacts=(*(task.done() for task in tasks), *finished_artifacts),
        seconds=time.monotonic() - started,
        layers=len(adapter.spec.layers),
        expanded=values.expanded,
        original=values.path if values.original else None,
    )


def _stream(values: PlainBase, adapter: Adapter, tasks: list[WriterTask], progress: Callable[[int, int], None]) -> None:
    """Pass every tensor to every writer, one at a time."""
    total, written = sum(task.writer.num_bytes for task in tasks), 0
    for name in values.shapes if tasks else ():
        weight = values.read(name)
        change = change_of(adapter, name, weight)
        merged = weight if change is None else weight + change
        for task in tasks:
            if change is not None and not task.unmerged:
                task.survival.add(weight, change, partial(task.writer.as_read, name))
            written += task.writer.put(name, weight if task.unmerged else merged)
        progress(written, total)
    for task in tasks:
        task.writer.close()


def _check(base: ModelFolder, adapter: Adapter, targets: Sequence[Target], overwrite: bool) -> None:
    """Check the target folders, and that the adapter belongs to the base, is finite and changes it."""
    for target in targets:
        check_target(target.out, marker=RECORD, overwrite=overwrite)
        out = target.out.resolve()
        for path, role in ((base.path.resolve(), "base model"), (adapter.path.resolve(), "adapter")):
            if out == path or out in path.parents:
                raise FishError(f"--out {target.out} would replace the {role} in {path}; choose another folder.")
    check_fits(adapter, base.linear_layers, base.name)
    check_base(adapter, base.fingerprint, base.name)
    for name, array in (adapter.arrays | adapter.magnitudes).items():
        if not np.isfinite(array).all():
            raise FishError(
                f"{name} of the adapter {adapter.path} has values that are not finite; use an earlier checkpoint."
            )
    if not changes_anything(adapter):
        raise FishError(
            f"the adapter {adapter.path} changes nothing, since every B A is zero as before training; train it first."
        )


def _check_space(targets: Sequence[Target], num_bytes: int) -> None:
    folder = next(parent for parent in targets[0].out.absolute().parents if parent.is_dir())
    needed, free = num_bytes + _EXTRA_FILES_BYTES * len(targets), shutil.disk_usage(folder).free
    if free < needed:
        raise FishError(
            f"the fused model needs {needed / 1e9:.1f} GB, but {folder} has only {free / 1e9:.1f} GB free; "
            "free some disk space, or choose another --out."
        )


def _export_context(base: ModelFolder, values: PlainBase, adapter: Adapter, shard_bytes: int) -> ExportContext:
    """Collect the input that all writers share: model metadata, model cards and the record of origin."""
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
        system=_run_text(run, "template", "system"),
        trained_length=_run_int(run, "settings", "max_seq_length"),
    )
    tuning = Tuning.from_run(run, base=base.name, license=license_name)
    cards = {dtype: fused_card(tuning, dtype=dtype) for dtype in DTYPES}
    return ExportContext(model, adapter, cards, _record(base, adapter), values.dtype, shard_bytes)


def _run_value(run: dict[str, Any], section: str, key: str) -> Any:
    """Return an entry of run.json; None if it is missing."""
    entries = run.get(section)
    return entries.get(key) if isinstance(entries, dict) else None


def _run_text(run: dict[str, Any], section: str, key: str) -> str | None:
    value = _run_value(run, section, key)
    return value if isinstance(value, str) and value else None


def _run_int(run: dict[str, Any], section: str, key: str) -> int | None:
    value = _run_value(run, section, key)
    return value if isinstance(value, int) and value > 0 else None


def _generation_config(base: ModelFolder, adapter: Adapter, run: dict[str, Any]) -> dict[str, Any]:
    """Return the generation config of the adapter, else of the base, with all end tokens.

    The end tokens are the tuned template's, the config's own and the base's.
    """
    path = adapter.path / "generation_config.json"
    config = read_json(path) if path.is_file() else dict(base.generation_config)
    template_end, stored = _run_value(run, "template", "end_token_id"), config.get("eos_token_id")
    ends = [template_end, *(stored if isinstance(stored, list) else [stored]), *base.end_token_ids]
    unique = list(dict.fromkeys(token for token in ends if isinstance(token, int)))
    if unique:
        config["eos_token_id"] = unique
    for key in ("bos_token_id", "pad_token_id"):
        if config.get(key) is None and base.config.get(key) is not None:
            config[key] = base.config[key]
    return config


def _record(base: ModelFolder, adapter: Adapter) -> dict[str, Any]:
    """Return the content of mlx_fish.json: names only, no paths.

    The fused model is a new model, so it has no `source` and no fingerprint.
    """
    return {
        "made_by": "mlx-fish fuse",
        "version": __version__,
        "base": public_name(base.name),
        "revision": base.revision,
        "adapter": adapter.path.resolve().name,
    }
