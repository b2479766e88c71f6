"""Measure mlx-fish's training beside another trainer on the same rows, model and settings.

    python benchmarks/bench.py --vs trainer --model DIR --updates 15 --rounds 2 --json bench.json
    python benchmarks/bench.py --vs mlx-lm --model DIR           # mlx-lm's tuner with its own batching
    python benchmarks/bench.py --vs mlx-lm-ours --model DIR      # the same, given mlx-fish's batches
    python benchmarks/bench.py --vs mlx-lm --model DIR --layers 2 --length 512 --batch-size 8

Each system runs in a process of its own, in turn (A B A B), and reports each update on a pipe; the clock is this process's, over
the updates after the first three. A token is useful when it belongs to a row: padding does not count. Memory is the peak above
what was held with the weights loaded: MLX's own count where both compute with MLX (adapter and optimizer are in it), the GPU's or
the process's otherwise. Both systems meet the same rows: the first three updates are the same ones for both, and their losses must
agree before anything is measured; the rest is ordered by each system in its own way (mlx-fish puts rows of like length together,
the others shuffle and pad).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_systems import SYSTEMS, child
from bench_task import DEFAULTS, WARM_UPDATES, write_first_blocks

from mlx_fish.models.hub import find_model

AGREEMENT = 1e-3  # relative, of the first updates' losses
SETTINGS = ("model", "backend", "updates", "batch_size", "rank", "layers", "length", "packing", "grad_checkpoint")


@dataclass(frozen=True)
class Measurement:
    """One run of one system.

    Attributes:
        cpu_seconds_per_update: of all its threads; 0 where there is no /proc. Says more than the clock on a busy machine.
        memory: the peak in bytes above the weights, None where it is not known.
        padding: the share of the input positions computed that belong to no row.
        losses: of the first updates.
    """

    system: str
    tokens_per_second: float
    seconds_per_update: float
    cpu_seconds_per_update: float
    memory: int | None
    padding: float
    losses: list[float]


def measure(system: str, settings: dict[str, Any]) -> tuple[Measurement, dict[str, Any]]:
    """Run one system once; also what it said of device and dtype."""
    command = [sys.executable, __file__, "--child", json.dumps(settings | {"system": system})]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        base, memory, setup, updates = 0, None, {}, []
        for arrived, event in events(process.stdout):
            if event["event"] == "update":
                updates.append((arrived, cpu_seconds(process.pid), event["loss"], event["tokens"], event["computed"]))
                continue
            if event["event"] == "loaded":
                setup, base = event, resident(process.pid, "VmRSS")
                reset_peak(process.pid)
            else:
                memory = event["memory"] if event["memory"] is not None else resident(process.pid, "VmHWM") - base
            process.stdin.write("\n")
            process.stdin.flush()
        if process.wait() != 0 or len(updates) <= WARM_UPDATES:
            errors.seek(0)
            raise SystemExit(f"{system} failed:\n{errors.read()[-3000:]}")
    seconds = updates[-1][0] - updates[WARM_UPDATES - 1][0]
    computed = updates[-1][1] - updates[WARM_UPDATES - 1][1]
    timed = updates[WARM_UPDATES:]
    tokens, positions = (sum(update[field] for update in timed) for field in (3, 4))
    run = Measurement(
        system=system,
        tokens_per_second=tokens / seconds,
        seconds_per_update=seconds / len(timed),
        cpu_seconds_per_update=computed / len(timed),
        memory=memory if base or memory else None,
        padding=1 - tokens / positions,
        losses=[update[2] for update in updates[:WARM_UPDATES]],
    )
    return run, setup


def events(lines: Any) -> Iterator[tuple[float, dict[str, Any]]]:
    """(when it arrived, event) for each line of a child."""
    for line in lines:
        yield time.monotonic(), json.loads(line)


def resident(pid: int, field: str) -> int:
    """VmRSS or VmHWM of a process in bytes; 0 where there is no /proc."""
    status = Path(f"/proc/{pid}/status")
    return 1024 * int(status.read_text().split(f"{field}:", 1)[1].split()[0]) if status.is_file() else 0


def cpu_seconds(pid: int) -> float:
    """User and system time of a process's threads; 0 where there is no /proc."""
    status = Path(f"/proc/{pid}/stat")
    if not status.is_file():
        return 0.0
    fields = status.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def reset_peak(pid: int) -> None:
    place = Path(f"/proc/{pid}/clear_refs")
    if place.exists():
        place.write_text("5")


def check_agreement(first: Measurement, second: Measurement) -> float:
    """The largest relative difference of the first updates' losses, which must be small: else two things were measured."""
    worst = max(abs(a - b) / a for a, b in zip(first.losses, second.losses, strict=True))
    if not worst <= AGREEMENT:
        raise SystemExit(f"the losses of the same updates differ by {worst:.1e}: {first.losses} and {second.losses}")
    return worst


def table(measured: list[Measurement], systems: Sequence[str]) -> str:
    """Markdown: the median of each system's runs, all runs in brackets, and the ratios to the last system."""

    def of(system: str, name: str) -> list[float]:
        return [getattr(run, name) for run in measured if run.system == system and getattr(run, name) is not None]

    lines = [
        "| system | useful tokens/s | s an update | CPU s an update | peak above weights | padding |",
        "|---|---|---|---|---|---|",
    ]
    for system in systems:
        speeds, memory = of(system, "tokens_per_second"), of(system, "memory")
        shown = ", ".join(f"{speed:.1f}" for speed in speeds)
        gigabytes = f"{statistics.median(memory) / 1e9:.2f} GB" if memory else "not known"
        each, computed = (statistics.median(of(system, f"{kind}seconds_per_update")) for kind in ("", "cpu_"))
        lines.append(
            f"| {system} | {statistics.median(speeds):.1f} ({shown}) | {each:.2f} | {computed:.2f} | {gigabytes} "
            f"| {statistics.median(of(system, 'padding')):.1%} |"
        )
    ratios = []
    for field in ("tokens_per_second", "seconds_per_update", "cpu_seconds_per_update", "memory"):
        ours, theirs = (statistics.median(of(name, field) or [0]) for name in (systems[0], systems[-1]))
        ratios.append(f"{ours / theirs:.2f}" if theirs else "not known")
    lines.append(f"| ratio | {' | '.join(ratios)} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vs", choices=[name for name in SYSTEMS if name != "mlx-fish"], default="trainer")
    parser.add_argument("--model", default="tiny", help="a folder, a Hub id or `tiny`")
    parser.add_argument(
        "--backend", choices=("mlx", "torch"), help="of mlx-fish [default: what the other computes with]"
    )
    parser.add_argument("--updates", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, help="only the model's first blocks [default: all]")
    parser.add_argument("--length", type=int, help="rows of exactly so many tokens [default: the fish data's rows]")
    parser.add_argument(
        "--packing", action=argparse.BooleanOptionalAction, default=DEFAULTS.packing, help="of mlx-fish"
    )
    parser.add_argument("--grad-checkpoint", action="store_true", help="in both systems")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each system, in turn")
    parser.add_argument("--json", type=Path, help="also write every run here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(argparse.Namespace(**json.loads(options.child)))
    if options.updates <= WARM_UPDATES:
        parser.error(f"--updates {options.updates}: more than the {WARM_UPDATES} that are not timed were expected.")
    other = "torch" if options.vs == "trainer" else "mlx"
    options.backend = options.backend or other
    if other == "mlx" and options.backend != "mlx":
        parser.error(f"--vs {options.vs} compares what MLX computes with, so --backend mlx was expected.")
    with tempfile.TemporaryDirectory() as folder:
        settings = {name: getattr(options, name) for name in SETTINGS}
        if options.layers:
            write_first_blocks(find_model(options.model), Path(folder), options.layers)
            settings["model"] = folder
        compare(options, settings)


def compare(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Measure both systems in turn, print the table, write the runs."""
    systems = ("mlx-fish", options.vs)
    measured: list[Measurement] = []
    setup = {}
    for number in range(options.rounds):
        for system in systems:
            run, setup[system] = measure(system, settings)
            measured.append(run)
            print(f"{system}: {run.tokens_per_second:.1f} tokens/s", file=sys.stderr, flush=True)
        if number == 0:
            apart = check_agreement(*measured)
    print(
        f"{setup['mlx-fish']['device']}, {setup['mlx-fish']['dtype']}; losses of the first {WARM_UPDATES} updates agree to {apart:.0e}\n"
    )
    print(table(measured, systems))
    if options.json:
        record = {"setup": setup, "agreement": apart, "runs": [asdict(run) for run in measured]}
        record["settings"] = {name: getattr(options, name) for name in SETTINGS}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
