"""Small runs on the tiny model, in forked children where they may be killed; and what two runs must have in common."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy_backend import NumpyBackend

from mlx_fish.config import TrainConfig
from mlx_fish.training import train as training

TIMED = ("elapsed_time", "remaining_time", "throughput")
SMALL: dict[str, Any] = {
    "model": "tiny", "iters": 6, "save_every": 2, "eval_every": 3, "logging_steps": 2, "lora_rank": 1, "num_layers": 1,
    "lora_target": "q_proj", "batch_size": 2, "grad_accumulation": 2,
}  # fmt: skip


def write_rows(path: Path, count: int = 30) -> Path:
    rows = [{"question": f"第{i}条鱼怎么养？", "answer": "换水。" * (1 + i % 5)} for i in range(count)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def train(backend: NumpyBackend, **settings: Any) -> None:
    """`mlx-fish train` on a NumPy backend, in this process."""
    _with(backend, lambda: training.train(TrainConfig(**settings)))


def resume(backend: NumpyBackend, checkpoint: str = "newest", **settings: Any) -> None:
    """`mlx-fish train --resume` on a NumPy backend, in this process."""
    _with(backend, lambda: training.resume(settings, checkpoint))


def _with(backend: NumpyBackend, work: Callable[[], Any]) -> None:
    real, training.load_backend = training.load_backend, lambda *arguments, **options: backend
    try:
        work()
    finally:
        training.load_backend = real


def in_child(work: Callable[[], Any], errors: Path = Path(os.devnull)) -> int:
    """The exit code of `work` done in a forked child, its stderr in a file; negative: the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    os.fsync = lambda handle: None  # a killed process loses nothing that it wrote, and a disk takes its time
    try:
        handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 2)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        work()
        code = 0
    except KeyboardInterrupt as stop:
        code = stop.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def log_of(output: Path) -> list[dict[str, Any]]:
    """The log without its times; its losses as float.hex, so that equal means equal to the bit."""
    entries = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {key: value.hex() if isinstance(value, float) else value for key, value in entry.items() if key not in TIMED}
        for entry in entries
    ]


def outcome(output: Path) -> dict[str, Any]:
    """What must be equal to the bit: the adapter, the newest checkpoint's numbers, and the log."""
    newest = sorted((output / "checkpoints").glob("step-*"))[-1]
    return {
        "adapter": (output / "adapter_model.safetensors").read_bytes(),
        "config": (output / "adapter_config.json").read_bytes(),
        "checkpoint": newest.name,
        "checkpoint adapter": (newest / "adapter_model.safetensors").read_bytes(),
        "optimizer": (newest / "optimizer.safetensors").read_bytes(),
        "log": log_of(output),
    }
