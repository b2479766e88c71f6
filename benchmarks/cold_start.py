"""How long a person waits for the first update: from the start of `mlx-fish train` to the line that reports it, and where that went.

    python benchmarks/cold_start.py --model tiny --backend mlx --rounds 5 [--empty-cache]

Each line that the program writes is timed by this process's clock; the processor seconds of the whole command (its last lines
included, the picture and a second sample answer) say more on a busy machine. With `--empty-cache` MLX's CPU build finds none of the kernels
that it compiled in earlier runs, as on a new machine (on Metal nothing is compiled by a C++ compiler).
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

MARKS = {  # what is done when a line that begins so appears
    "model": "Python, imports, data and tokenizer",
    "computing": "the framework and the model loaded",
    "validation": "a sample answer and a validation",
    "1/1": "the first update",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--backend", choices=("mlx", "torch"), default="mlx")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--empty-cache", action="store_true", help="compile MLX's CPU kernels anew in each round")
    options = parser.parse_args()
    rounds = [
        first_update(options.model, options.backend, empty_cache=options.empty_cache) for _ in range(options.rounds)
    ]
    print("| when this was done | seconds after the start: median (least to most) |\n|---|---|")
    for mark, done in MARKS.items():
        times = [found[mark] for found in rounds]
        print(f"| {done} | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) |")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\nProcessor seconds of a whole command: {(used.ru_utime + used.ru_stime) / options.rounds:.2f}")


def first_update(model: str, backend: str, *, empty_cache: bool) -> dict[str, float]:
    """Seconds from the start of the process to each mark."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mlx_fish", "train", f"--model={model}", f"--backend={backend}"]
        command += ["--iters=1", f"--output-dir={folder}/run"]
        # MLX keeps its kernels under the system's folder of temporary files
        environment = os.environ | ({"TMPDIR": folder} if empty_cache else {})
        started = time.monotonic()
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1, env=environment) as process:
            assert process.stderr is not None
            found, lines = {}, []
            for line in process.stderr:
                lines.append(line)
                word = line.split()[0] if line.strip() else ""
                if word in MARKS and word not in found:
                    found[word] = time.monotonic() - started
        if process.returncode != 0 or set(found) != set(MARKS):
            raise SystemExit(f"{' '.join(command)} failed:\n{''.join(lines)[-3000:]}")
    return found


if __name__ == "__main__":
    main()
