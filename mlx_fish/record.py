"""What a run leaves beside its adapter: run.json, the tokenizer, the generation config."""

import contextlib
import dataclasses
import platform
import sys
from pathlib import Path
from typing import Any

from mlx_fish import __version__
from mlx_fish.adapter import RUN_FILE, peft_config
from mlx_fish.data import Example
from mlx_fish.files import write_json
from mlx_fish.model_folder import copy_tokenizer
from mlx_fish.plan import Plan, end_ids


def adapter_config(plan: Plan) -> dict[str, Any]:
    """adapter_config.json of the run's adapter."""
    return peft_config(
        plan.spec,
        rank=plan.config.lora_rank,
        alpha=plan.config.lora_alpha,
        num_blocks=plan.num_blocks,
        base=plan.folder.name,
        revision=plan.folder.revision,
    )


def write_run(plan: Plan, output: Path, results: dict[str, Any]) -> None:
    """run.json, the tokenizer and the generation config: all that `generate`, `evaluate` and `fuse` need to know.

    run.json comes first: by it a folder is known as a run, however soon that is killed.
    """
    write_json(output / RUN_FILE, run_record(plan, results))
    copy_tokenizer(plan.folder.path, output, chat_template=plan.template.jinja)
    generation = {**plan.folder.generation_config, "eos_token_id": list(end_ids(plan))}
    write_json(output / "generation_config.json", generation)


def run_record(plan: Plan, results: dict[str, Any]) -> dict[str, Any]:
    """What run.json holds."""
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": _versions("numpy", "transformers", "mlx", "mlx-lm", "torch", "peft"),
        "settings": dataclasses.asdict(plan.config),
        "iters": plan.iters,
        "base": {
            "name": plan.folder.name,
            "path": str(plan.folder.path.resolve()),
            "revision": plan.folder.revision,
            "fingerprint": plan.folder.fingerprint,
            "dtype": plan.folder.weights.dtype,
            "quantization": plan.folder.quantization,
        },
        "template": {
            "name": plan.template.name,
            "end_token_id": plan.template.end_token_id,
            "system": shared_system(plan.dataset.splits["train"]),
        },
        "data": {
            "name": plan.dataset.name,
            "sha256": plan.dataset.hashes,
            "tokens_sha256": plan.digest,
            "rows": len(plan.rows),
            "validation_rows": len(plan.valid_rows),
            "skipped_rows": plan.skipped.count,
            "splits": {split: len(rows) for split, rows in plan.dataset.splits.items()},
        },
        "results": results,
    }


def shared_system(rows: list[Example]) -> str | None:
    """The system prompt with which every row begins; None when there is none, or more than one."""
    found = {row.turns[0].content if row.turns[0].role == "system" else None for row in rows}
    return found.pop() if len(found) == 1 else None


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed: no machine needs both frameworks."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
