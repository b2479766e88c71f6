"""Fuse an adapter with its base: check that they belong together, merge, and write the result whole or not at all.

Runs without a framework, but for a base that MLX quantised (`merge.py`). Knows nothing of how a target stores what it
is handed (`export/`).
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fish import __version__
from mlx_fish.adapter import Adapter, check_base, check_fits, key_a, key_b, read_run
from mlx_fish.errors import FishError, did_you_mean
from mlx_fish.export import MergedModel, hf
from mlx_fish.files import check_target, new_folder, read_json
from mlx_fish.merge import BaseValues, Survival, find_original, is_tied, merge_tensor
from mlx_fish.model_card import Tuning, fused_card, license_of, public_name
from mlx_fish.model_folder import RECORD, ModelFolder
from mlx_fish.tensors import DTYPES, SHARD_BYTES

_BESIDE_BYTES = 64_000_000  # room for what lies beside the weights; a tokenizer takes some 10 MB


@dataclass(frozen=True)
class FuseResult:
    """What was written, and what became of the adapter.

    Attributes:
        dtype: the stored type.
        num_bytes: of the weights.
        layers: how many layers were merged.
        kept: the share of the adapter that survives the cast, 0 to 1, see `merge.Survival`.
        changed: the share of the adapted weights whose stored value the adapter changed, 0 to 1.
        expanded: the base was quantised, and its values were expanded.
        original: the base was quantised, and this unquantised folder was used in its stead.
    """

    path: Path
    dtype: str
    num_bytes: int
    seconds: float
    layers: int
    kept: float
    changed: float
    expanded: bool
    original: Path | None


def fuse(
    *,
    base: ModelFolder,
    adapter: Adapter,
    out: Path,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> FuseResult:
    """Write base + adapter as a plain Hugging Face folder at `out`.

    Args:
        dtype: float32, float16 or bfloat16; None: that of the weights used, bfloat16 when they have to be expanded.
        progress: called with the bytes written so far and all there are, after each tensor.
        shard_bytes: the most that one weights file holds.

    Raises:
        FishError: the adapter does not belong to this base or changes nothing; `out` is taken; too little disk space;
            a value too large for float16. Then nothing is left at `out`.
    """
    started = time.monotonic()
    _check(base, adapter, out, overwrite)
    original = find_original(base) if base.quantization else None
    values = BaseValues(original or base)
    dtype = _stored_dtype(dtype, values.folder)
    total = sum(int(np.prod(shape, dtype=np.int64)) for shape in values.shapes.values()) * DTYPES[dtype][1]
    _check_space(out, total)
    run = read_run(adapter.path)
    survival = Survival()
    model = _merged(base, values, adapter, run, dtype, survival)
    card = fused_card(Tuning.from_run(run, base=base.name, license=license_of(values.folder.path)), dtype=dtype)
    written = 0

    def count(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        progress(written, total)

    with new_folder(out, marker=RECORD, overwrite=overwrite) as folder:
        record = _record(base, adapter, dtype)
        hf.write(folder, model, dtype=dtype, card=card, record=record, shard_bytes=shard_bytes, progress=count)
    return FuseResult(
        path=out,
        dtype=dtype,
        num_bytes=total,
        seconds=time.monotonic() - started,
        layers=len(adapter.spec.layers),
        kept=survival.kept,
        changed=survival.changed,
        expanded=values.folder.quantization is not None,
        original=original.path if original else None,
    )


def _check(base: ModelFolder, adapter: Adapter, out: Path, overwrite: bool) -> None:
    check_target(out, marker=RECORD, overwrite=overwrite)
    target = out.resolve()
    for path, what in ((base.path.resolve(), "base model"), (adapter.path.resolve(), "adapter")):
        if target == path or target in path.parents:
            raise FishError(f"--out {out} would replace the {what} in {path}; name another folder.")
    check_fits(adapter, base.linear_layers, base.name)
    check_base(adapter, base.fingerprint, base.name)
    for name, array in adapter.arrays.items():
        if not np.isfinite(array).all():
            raise FishError(f"{name} of the adapter {adapter.path} is not finite; use an earlier checkpoint.")
    if not any(_changes(adapter, module) for module in adapter.spec.layers):
        raise FishError(
            f"the adapter {adapter.path} changes nothing: every B A is zero, as before training; train it first."
        )


def _changes(adapter: Adapter, module: str) -> bool:
    a, b = adapter.arrays[key_a(module)], adapter.arrays[key_b(module)]
    return bool((a.any(axis=1) & b.any(axis=0)).any()) and adapter.spec.scales[module] != 0


def _stored_dtype(dtype: str | None, source: ModelFolder) -> str:
    if dtype is None:
        return "bfloat16" if source.quantization else source.weights.dtype
    if dtype not in DTYPES:
        raise FishError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    return dtype


def _check_space(out: Path, num_bytes: int) -> None:
    place = next(parent for parent in out.absolute().parents if parent.is_dir())
    needed, free = num_bytes + _BESIDE_BYTES, shutil.disk_usage(place).free
    if free < needed:
        raise FishError(
            f"the fused model takes {needed / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free; "
            "make room, or use another --out."
        )


def _merged(
    base: ModelFolder,
    values: BaseValues,
    adapter: Adapter,
    run: dict[str, Any],
    dtype: str,
    survival: Survival,
) -> MergedModel:
    """The stream for a target, and what lies beside it. Reading the stream fills `survival`."""
    template = adapter.path / "chat_template.jinja"
    return MergedModel(
        shapes=values.shapes,
        read=lambda name: merge_tensor(values, adapter, name, dtype, survival),
        config={**values.folder.config, "tie_word_embeddings": is_tied(values.folder)},
        generation_config=_generation_config(base, adapter, run),
        tokenizer_folder=adapter.path if (adapter.path / "tokenizer.json").is_file() else base.path,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
    )


def _generation_config(base: ModelFolder, adapter: Adapter, run: dict[str, Any]) -> dict[str, Any]:
    """The adapter's, else the base's, stopping at the tuned template's end token and wherever the base stops."""
    path = adapter.path / "generation_config.json"
    config = read_json(path) if path.is_file() else dict(base.generation_config)
    template, own = run.get("template"), config.get("eos_token_id")
    tuned = template.get("end_token_id") if isinstance(template, dict) else None
    ends = [tuned, *(own if isinstance(own, list) else [own]), *base.end_token_ids]
    unique = list(dict.fromkeys(token for token in ends if isinstance(token, int)))
    if unique:
        config["eos_token_id"] = unique
    for key in ("bos_token_id", "pad_token_id"):
        if config.get(key) is None and base.config.get(key) is not None:
            config[key] = base.config[key]
    return config


def _record(base: ModelFolder, adapter: Adapter, dtype: str) -> dict[str, Any]:
    """mlx_fish.json: names, no paths. No `source` and no fingerprint, since what was fused is a model of its own."""
    return {
        "made_by": "mlx-fish fuse",
        "version": __version__,
        "base": public_name(base.name),
        "revision": base.revision,
        "adapter": adapter.path.resolve().name,
        "dtype": dtype,
    }
