"""Kill a training run N times at random moments (SIGKILL), resume it each time, and compare with a run that was left alone.

    python tools/kill_resume.py 20 [--seed 1]

Runs the built-in tiny model on the fish-care data, saving at every update. Exits with 1 when a byte or a loss differs.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SETTINGS = [
    "--model", "tiny", "--save-every", "1", "--eval-every", "2", "--eval-rows", "4", "--batch-size", "2", "--grad-accumulation", "2",
    "--lora-dropout", "0.1", "--lora-rank", "2", "--learning-rate", "1e-3",
]  # fmt: skip


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mlx_fish", "train", *arguments]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def kill_somewhere(process: subprocess.Popen[str], chance: random.Random) -> tuple[str, str]:
    """Let the run print a random number of lines and then a moment more, and kill it.

    Returns:
        what it was doing last (the first word of its last line), and all it had printed.
    """
    lines = [process.stderr.readline() for _ in range(chance.randint(5, 8))]
    time.sleep(chance.random() * 0.25)
    process.kill()
    rest = process.stderr.read()
    process.wait()
    text = "".join(lines) + rest
    last = text.strip().splitlines()[-1].split() if text.strip() else ["nothing"]
    return ("update" if "/" in last[0] else last[0]), text


def losses(output: Path) -> list[tuple[int, str, str]]:
    """(step, which loss, its float.hex) of every line of the log."""
    entries = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        (entry["current_steps"], key, entry[key].hex())
        for entry in entries
        for key in ("loss", "eval_loss")
        if key in entry
    ]


def run(kills: int, seed: int) -> bool:
    """Whether the killed run came to the same end."""
    chance = random.Random(seed)
    iters = ["--iters", str(8 * kills), "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = start([*SETTINGS, *iters, "--output-dir", "whole"], folder)
        _, errors = whole.communicate()
        if whole.returncode:
            raise SystemExit(errors)
        arguments = [*SETTINGS, *iters, "--output-dir", "killed"]
        moments: Counter[str] = Counter()
        for number in range(kills):
            moment, errors = kill_somewhere(start(arguments, folder), chance)
            moments[moment] += 1
            if "Error" in errors or "is complete" in errors:
                raise SystemExit(f"after kill {number}:\n{errors}")
            arguments = ["--resume", "--output-dir", "killed"]
            if not (folder / "killed" / "run.json").exists():
                arguments = [*SETTINGS, *iters, "--output-dir", "killed"]
        last = start(arguments, folder)
        _, errors = last.communicate()
        if last.returncode:
            raise SystemExit(errors)
        same = losses(folder / "killed") == losses(folder / "whole")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            same = same and (folder / "killed" / file).read_bytes() == (folder / "whole" / file).read_bytes()
    print(f"seed {seed}: {kills} kills ({', '.join(f'{count} x {moment}' for moment, count in moments.items())})")
    print("equal to the bit" if same else "DIFFERENT")
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sys.exit(0 if run(options.kills, options.seed) else 1)
