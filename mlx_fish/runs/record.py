"""Write the record of a run, run.json, and the files next to the adapter: the tokenizer and the generation config."""

import contextlib
import dataclasses
import platform
import sys
from pathlib import Path
from typing import Any

from mlx_fish import __version__
from mlx_fish.adapters.peft import Adapter, peft_config
from mlx_fish.data.examples import Example
from mlx_fish.errors import FishError
from mlx_fish.models.folder import copy_tokenizer
from mlx_fish.planning.job import Job, end_ids, sample_question
from mlx_fish.runs.folder import RUN_FILE, read_run
from mlx_fish.storage.files import path_of, write_json


def adapter_config(job: Job) -> dict[str, Any]:
    """Return the content of adapter_config.json for the run's adapter."""
    return peft_config(
        job.spec,
        rank=job.config.lora_rank,
        alpha=job.config.lora_alpha,
        num_blocks=job.num_blocks,
        base=job.folder.name,
        revision=job.folder.revision,
    )


def write_run(job: Job, output: Path, results: dict[str, Any]) -> None:
    """Write run.json, the tokenizer and the generation config, which `generate`, `evaluate` and `fuse` need.

    run.json is written first: it marks the folder as a run, even if the process is killed right afterwards.
    """
    write_json(output / RUN_FILE, run_record(job, results))
    copy_tokenizer(job.folder.path, output, chat_template=job.template.jinja)
    generation = {**job.folder.generation_config, "eos_token_id": list(end_ids(job))}
    write_json(output / "generation_config.json", generation)


def run_record(job: Job, results: dict[str, Any]) -> dict[str, Any]:
    """Return the content of run.json."""
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": _versions("numpy", "transformers", "mlx", "mlx-lm", "torch", "peft"),
        "settings": dataclasses.asdict(job.config),
        "iters": job.iters,
        "base": {
            "name": job.folder.name,
            "path": str(job.folder.path.resolve()),
            "revision": job.folder.revision,
            "fingerprint": job.folder.fingerprint,
            "dtype": job.folder.weights.dtype,
            "quantization": job.folder.quantization,
        },
        "template": {
            "name": job.template.name,
            "end_token_id": job.template.end_token_id,
            "system": shared_system(job.dataset.splits["train"]),
        },
        "data": {
            "name": job.dataset.name,
            "path": str(job.dataset.path) if job.dataset.path else None,
            "warning": job.dataset.warning,
            "sha256": job.dataset.hashes,
            "tokens_sha256": job.digest,
            "rows": len(job.rows),
            "validation_rows": len(job.valid_rows),
            "skipped_rows": job.skipped.count,
            "splits": {split: len(rows) for split, rows in job.dataset.splits.items()},
        },
        "sample": {"question": sample_question(job)},
        "results": results,
    }


def data_path(record: dict[str, Any]) -> Path | None:
    """Return the path from which a run loaded its data, or None for built-in data and old records."""
    data = record.get("data")
    path = data.get("path") if isinstance(data, dict) else None
    return path_of(path) if isinstance(path, str) else None


def shared_system(rows: list[Example]) -> str | None:
    """Return the system prompt that all rows share, or None if they have none or different ones."""
    prompts = {row.turns[0].content if row.turns[0].role == "system" else None for row in rows}
    return prompts.pop() if len(prompts) == 1 else None


def check_base(adapter: Adapter, fingerprint: str, model: str) -> None:
    """Check that a model is the base that the adapter was trained on. Adapters without a fingerprint in run.json pass.

    Args:
        fingerprint: `ModelFolder.fingerprint` of the model.
        model: name of the model, for the error message.

    Raises:
        FishError: the fingerprints differ.
    """
    trained_on = read_run(adapter.path).get("base")
    if not isinstance(trained_on, dict) or trained_on.get("fingerprint") in (None, fingerprint):
        return
    raise FishError(
        f"the adapter {adapter.path} was trained on {trained_on.get('name', adapter.base)}, but the weights of {model} "
        "are different; set --model to the model it was trained on."
    )


def _versions(*packages: str) -> dict[str, str]:
    """Return the versions of the packages that are installed; no machine needs both frameworks."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
