"""Train with several settings, one after another, and print what each came to: how the defaults of `mlx-fish train` were chosen.

    python benchmarks/sweep.py --out sweeps -- "--learning-rate 1e-4" "--learning-rate 2e-4 --schedule linear"

Each argument is a string of options for `mlx-fish train`; --common holds those that all runs share.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path


def run(options: str, common: str, out: Path) -> dict:
    """One training run -> the figures of its row. A run that is already there is read, not repeated."""
    folder = out / re.sub(r"[^a-z0-9.]+", "-", options.lower()).strip("-")
    record = folder / "run.json"
    if not record.is_file() or not json.loads(record.read_text(encoding="utf-8"))["results"]:
        command = [sys.executable, "-m", "mlx_fish", "train", *shlex.split(common), *shlex.split(options)]
        subprocess.run([*command, "--output-dir", str(folder), "--overwrite"], check=True)
    results = json.loads(record.read_text(encoding="utf-8"))["results"]
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    validations = [(entry["current_steps"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    best = min(validations, key=lambda pair: pair[1])
    last = losses[-min(10, len(losses)) :]
    return {
        "options": options,
        "training loss, last ten updates": f"{sum(last) / len(last):.3f}",
        "validation before": f"{validations[0][1]:.4f}",
        "validation after": f"{validations[-1][1]:.4f}",
        "best validation": f"{best[1]:.4f} after {best[0]}",
        "tokens/s": f"{results['tokens_per_second']:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--common", default="", help="options that all runs share")
    parser.add_argument("--out", type=Path, default=Path("sweeps"), help="folder of the runs")
    parser.add_argument("settings", nargs="+", help="options of one run each")
    arguments = parser.parse_args()
    rows = []
    for options in arguments.settings:
        rows.append(run(options, arguments.common, arguments.out))
        print("| " + " | ".join(rows[-1].values()) + " |", file=sys.stderr, flush=True)
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
