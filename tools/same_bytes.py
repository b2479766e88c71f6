"""Prove that a change to the code changes no byte of a run: the same commands on two checkouts, every file compared.

    python tools/same_bytes.py OLD NEW [--only PATTERN] [--keep FOLDER]

Runs a fixed list of commands on the tiny model (convert, train, resume, evaluate, generate, fuse; MLX and torch) with the
package of each checkout in turn, in a folder of the same path, and compares what they left: logs and records without their
times, every other file byte by byte, and what went to stdout. Differences that a mended bug explains are listed in
`EXPECTED` with the reason; any other one makes the exit code 1.
"""

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Values that hold wall time, memory or a version; a comparison leaves them out.
TIMED = {
    "elapsed_time", "remaining_time", "throughput", "seconds", "training_seconds", "tokens_per_second", "peak_bytes",
}  # fmt: skip
# manifest.json holds the sha256 of state.json, which holds times.
MANIFEST_SUM = "state.json"

# (pattern of a path, why it may differ). Empty while nothing but the arrangement of the code has changed.
EXPECTED: tuple[tuple[str, str], ...] = ()

SMALL = "--data rows.jsonl --iters 6 --save-every 2 --eval-every 3 --lora-rank 4 --learning-rate 2e-3 --keep 3"
TRAIN = f"train --model models/tiny-mlx {SMALL}"
RUNS = {
    "packed": "",
    "padded": "--no-packing",
    "accumulation": "--batch-size 2 --grad-accumulation 3",
    "dropout": "--lora-dropout 0.1",
    "checkpointing": "--grad-checkpoint on --num-layers 2",
    "targets": "--lora-target q_proj,down_proj --schedule linear --warmup 2 --template chatml --max-seq-length 40",
}
ALL_TARGETS = (
    "--to-hf --to-gguf f32 --to-gguf f16 --to-gguf bf16 --to-gguf q8_0 --to-gguf q4_0 --to-gguf q4_k_m --to-gguf-adapter "
    "--to-ollama fish --to-mlx --mlx-bits 4 --to-mlx-adapter --no-verify"
)


def commands() -> Iterator[tuple[str, str, str]]:
    """(name, backend, command line or `rm PATH`), in the order in which they build on each other."""
    yield "convert", "mlx", "convert --model tiny --out models/tiny-mlx"
    yield "convert 4 bits", "mlx", "convert --model tiny --out models/tiny-4bit -q 4"
    for backend in ("mlx", "torch"):
        for name, flags in RUNS.items():
            yield f"train {name}", backend, f"{TRAIN} {flags} --output-dir {backend}/{name}"
        yield "stopped", backend, f"rm {backend}/packed/checkpoints/step-00000006"
        yield "resume", backend, f"train --resume --output-dir {backend}/packed"
        yield "resume further", backend, f"train --resume --iters 8 --output-dir {backend}/packed"
        yield "evaluate", backend, f"evaluate --adapter {backend}/packed --json --split all"
        yield (
            "generate",
            backend,
            f"generate --adapter {backend}/packed -p 金鱼为什么容易浮头？ --compare --max-tokens 24 --json",
        )
        sampled = "--temp 0.8 --top-p 0.9 --top-k 20 --repetition-penalty 1.1 --max-tokens 16"
        yield "sample", backend, f"generate --adapter {backend}/targets --questions questions.txt {sampled}"
        yield "fuse", backend, f"fuse --adapter {backend}/packed {ALL_TARGETS} --out {backend}/fused"
        for dtype in ("float32", "float16"):
            yield (
                f"fuse {dtype}",
                backend,
                f"fuse --adapter {backend}/targets --to-hf --dtype {dtype} --no-verify --out {backend}/{dtype}",
            )
    yield "train on 4 bits", "mlx", f"train --model models/tiny-4bit {SMALL} --output-dir mlx/quantized"
    yield "fuse from 4 bits", "mlx", "fuse --adapter mlx/quantized --to-hf --to-mlx --no-verify --out mlx/from-4bit"
    yield "convert a GGUF file", "mlx", "convert --model mlx/fused/gguf/model-f32.gguf --out models/from-gguf"


def run_all(checkout: Path, folder: Path, pattern: str) -> None:
    """Run every command with the package of `checkout`, in the empty `folder`."""
    rows = [
        {"question": f"第{i}条鱼怎么养？", "answer": "每周换水一次，" * (1 + i % 5) + f"水温{20 + i % 8}度。"}
        for i in range(40)
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "questions.txt").write_text("金鱼怎么养？\n多久换一次水？\n水温多少合适？\n", encoding="utf-8")
    (folder / "stdout").mkdir()
    for name, backend, line in commands():
        if not fnmatch.fnmatch(f"{backend} {name}", pattern) and not name.startswith("convert"):
            continue
        started = time.monotonic()
        if line.startswith("rm "):
            shutil.rmtree(folder / line.removeprefix("rm "))
            continue
        environment = {**os.environ, "PYTHONPATH": str(checkout), "MLX_FISH_BACKEND": backend}
        command = [sys.executable, "-m", "mlx_fish", *line.split()]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{checkout}: mlx-fish {line}\n{done.stderr}")
        (folder / "stdout" / f"{backend} {name}.txt").write_text(done.stdout, encoding="utf-8")
        print(f"  {time.monotonic() - started:5.1f} s  {backend}: {name}", file=sys.stderr, flush=True)


def content(path: Path) -> Any:
    """What is compared of a file: parsed and without times where it holds any, else its bytes."""
    if path.name in ("run.json", "state.json", "mlx_fish.json"):
        return without_times(json.loads(path.read_text(encoding="utf-8")))
    if path.name == "trainer_log.jsonl":
        return [without_times(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.name == "manifest.json":
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["sha256"].pop(MANIFEST_SUM)
        return manifest
    return path.read_bytes()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if key not in TIMED}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def differences(old: Path, new: Path) -> tuple[int, list[str]]:
    """(number of equal files, what differs: `path: how`)."""
    names = sorted(
        {path.relative_to(root).as_posix() for root in (old, new) for path in root.rglob("*") if path.is_file()}
    )
    found = []
    for name in names:
        if not (old / name).is_file() or not (new / name).is_file():
            found.append(f"{name}: only in {'the new' if (new / name).is_file() else 'the old'} one")
            continue
        before, after = content(old / name), content(new / name)
        if before != after:
            found.append(f"{name}: {how(before, after)}")
    return len(names) - len(found), found


def how(before: Any, after: Any) -> str:
    """The first difference, in a few words."""
    if isinstance(before, bytes):
        return f"{len(before)} and {len(after)} bytes" if len(before) != len(after) else "other bytes"
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before | after:
            if before.get(key) != after.get(key):
                return f"{key}: {how(before.get(key), after.get(key))}"
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return next(how(a, b) for a, b in zip(before, after, strict=True) if a != b)
    return f"{str(before)[:60]} and {str(after)[:60]}"


def reason(difference: str) -> str | None:
    path = difference.split(": ", 1)[0]
    return next((why for pattern, why in EXPECTED if fnmatch.fnmatch(path, pattern)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="commands to run, such as 'torch train*'")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep both results there; an old one there is used again"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as temporary:
        results = arguments.keep or Path(temporary)
        results.mkdir(parents=True, exist_ok=True)
        for name in ("old", "new"):
            if name == "old" and (results / name).is_dir():
                continue
            shutil.rmtree(results / name, ignore_errors=True)
            work = results / "work"  # the same path for both, since records hold absolute ones
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            print(f"{name}: {getattr(arguments, name)}", file=sys.stderr, flush=True)
            run_all(getattr(arguments, name).resolve(), work, arguments.only)
            work.rename(results / name)
        equal, found = differences(results / "old", results / "new")
    unexplained = [difference for difference in found if reason(difference) is None]
    for difference in found:
        print(f"differs  {difference}" + (f"   ({why})" if (why := reason(difference)) else ""))
    print(f"{equal} files equal, {len(found)} differ, {len(unexplained)} of them without a reason in EXPECTED")
    sys.exit(1 if unexplained else 0)


if __name__ == "__main__":
    main()
