"""Measure mlx-fish's training beside another trainer on the same rows, model and settings.

    python scripts/bench.py --vs trainer --model DIR --updates 15 --rounds 2 --json bench.json

Each system runs in a process of its own, in turn (A B A B), and reports each update on a pipe; the clock is this process's, over
the updates after the first three. A token is useful when it belongs to a row: padding does not count. Memory is the peak above
what the process held with its weights loaded. Both systems meet the same rows: the first three updates are the same ones for
both, and their losses must agree before anything is measured; the rest is ordered by each system in its own way (mlx-fish puts
rows of like length together, the others shuffle and pad).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mlx_fish.adapter import LoraSpec, choose_layers, initial_arrays  # noqa: E402
from mlx_fish.batches import Updates  # noqa: E402
from mlx_fish.config import TrainConfig  # noqa: E402
from mlx_fish.data import load_dataset  # noqa: E402
from mlx_fish.hub import find_model  # noqa: E402
from mlx_fish.model_folder import ModelFolder  # noqa: E402
from mlx_fish.template import Tokens, choose_template, load_tokenizer  # noqa: E402

WARM_UPDATES = 3
AGREEMENT = 1e-3  # relative, of the first updates' losses
MAX_LENGTH = 2048
DEFAULTS = TrainConfig()


@dataclass(frozen=True)
class Task:
    """What every system computes: `updates` lists the rows of each, as mlx-fish orders them."""

    folder: ModelFolder
    rows: list[Tokens]
    spec: LoraSpec
    updates: Updates
    backend: str

    @property
    def initial(self) -> dict[str, Any]:
        return initial_arrays(self.spec, DEFAULTS.seed)


@dataclass(frozen=True)
class Measurement:
    """One run of one system: `losses` of the first updates; `memory` bytes above the weights, None where it is not known."""

    system: str
    tokens_per_second: float
    seconds_per_update: float
    memory: int | None
    losses: list[float]


def make_task(options: argparse.Namespace) -> Task:
    folder = find_model(options.model)
    template = choose_template("auto", load_tokenizer(folder), folder)
    examples = load_dataset("fish_care").splits["train"][: options.updates * options.batch_size]
    rows = [template.tokens(example, MAX_LENGTH) for example in examples]
    spec = LoraSpec.uniform(choose_layers(folder.linear_layers), rank=options.rank, alpha=2 * options.rank)
    updates = Updates(rows, batch_size=options.batch_size, accumulation=1, seed=DEFAULTS.seed)
    return Task(folder, rows, spec, updates, options.backend)


# --- the systems, each in its own process. `report` sends an event to the process that measures.

Report = Callable[..., None]


def run_mlx_fish(task: Task, report: Report) -> None:
    from mlx_fish.backends import load_backend

    backend = load_backend(task.folder, name=task.backend)
    backend.attach(task.spec, task.initial)
    if backend.name == "torch":
        touch_weights(backend.model)  # type: ignore[attr-defined]
    report("loaded", wait=True, device=backend.device, dtype=backend.dtype)
    backend.reset_peak_memory()
    before = backend.peak_memory()
    for step in range(task.updates.per_epoch):
        batches = task.updates[step]
        result = backend.step(batches, DEFAULTS.learning_rate, [0])()
        report("update", loss=result.loss, tokens=sum(batch.num_tokens for batch in batches))
    report("done", wait=True, memory=None if backend.device == "cpu" else backend.peak_memory() - before)


def run_trainer(task: Task, report: Report) -> None:
    """transformers' Trainer with PEFT: batches padded to their longest row, logits of every position."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from mlx_fish.backends.torch.model import choose_device, choose_dtype

    device = choose_device()
    dtype = choose_dtype(task.folder.weights.dtype, device)
    model = AutoModelForCausalLM.from_pretrained(task.folder.path, dtype=dtype)
    rank = next(iter(task.spec.ranks.values()))
    targets = sorted({module.rsplit(".", 1)[-1] for module in task.spec.layers})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # the same start
            parameter.data = torch.tensor(task.initial[name.replace(".default", "")]).to(parameter.dtype)
    rows = trainer_order(task)
    batch_size = task.updates.rows_per_update
    losses: list[float] = []

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(rows)

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            loss = super().training_step(*arguments, **named)
            losses.append(float(loss))
            return loss

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            done = rows[(state.global_step - 1) * batch_size : state.global_step * batch_size]
            report("update", loss=losses[-1], tokens=sum(len(row.ids) - 1 for row in done))

    def collate(batch: Sequence[Tokens]) -> dict[str, Any]:
        longest = max(len(row.ids) for row in batch)

        def padded(values: Callable[[Tokens], Any], fill: int) -> Any:
            found = np.full((len(batch), longest), fill, np.int64)
            for index, row in enumerate(batch):
                found[index, : len(row.ids)] = values(row)
            return torch.from_numpy(found)

        return {
            "input_ids": padded(lambda row: row.ids, 0),
            "attention_mask": padded(lambda row: np.ones(len(row.ids)), 0),
            "labels": padded(lambda row: np.where(row.supervised, row.ids, -100), -100),
        }

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=task.updates.per_epoch,
            per_device_train_batch_size=batch_size,
            learning_rate=DEFAULTS.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=device.type == "cpu",
        )
        trainer = InOrder(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Reporter()]
        )
        touch_weights(model)
        report("loaded", wait=True, device=device.type, dtype=str(dtype).removeprefix("torch."))
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        trainer.train()
        peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
        report("done", wait=True, memory=peak)


SYSTEMS: dict[str, Callable[[Task, Report], None]] = {"mlx-fish": run_mlx_fish, "trainer": run_trainer}


def trainer_order(task: Task) -> list[Tokens]:
    """The rows of mlx-fish's first updates, then the others shuffled: what is timed has no order by length."""
    by_place = {row.where: row for row in task.rows}
    names = [name for step in range(task.updates.per_epoch) for batch in task.updates[step] for name in batch.rows]
    first = names[: WARM_UPDATES * task.updates.rows_per_update]
    rest = names[len(first) :]
    shuffled = np.random.default_rng(DEFAULTS.seed).permutation(len(rest))
    return [by_place[name] for name in first] + [by_place[rest[index]] for index in shuffled]


def touch_weights(model: Any) -> None:
    """Mapped weights take memory only when they are read; they should not be counted as the training's."""
    for parameter in model.parameters():
        parameter.detach().sum()


def child(options: argparse.Namespace) -> None:
    """Run one system; events go to the pipe as JSON lines, and a waiting event waits for a line back."""
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like an event

    def report(event: str, *, wait: bool = False, **values: Any) -> None:
        pipe.write(json.dumps({"event": event, **values}) + "\n")
        if wait:
            sys.stdin.readline()

    SYSTEMS[options.child](make_task(options), report)


# --- the process that measures


def measure(system: str, options: argparse.Namespace) -> tuple[Measurement, dict[str, Any]]:
    """Run one system once; also what it said of device and dtype."""
    flags = [
        f"--{name.replace('_', '-')}={getattr(options, name)}" for name in ("model", "updates", "batch_size", "rank")
    ]
    command = [sys.executable, __file__, "--child", system, *flags, f"--backend={options.backend}"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        base, memory, setup, updates = 0, None, {}, []
        for arrived, event in events(process.stdout):
            if event["event"] == "update":
                updates.append((arrived, event["loss"], event["tokens"]))
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
    tokens = sum(count for _, _, count in updates[WARM_UPDATES:])
    losses = [loss for _, loss, _ in updates[:WARM_UPDATES]]
    each = seconds / (len(updates) - WARM_UPDATES)
    return Measurement(system, tokens / seconds, each, memory if base or memory else None, losses), setup


def events(lines: Any) -> Iterator[tuple[float, dict[str, Any]]]:
    """(when it arrived, event) for each line of a child."""
    for line in lines:
        yield time.monotonic(), json.loads(line)


def resident(pid: int, field: str) -> int:
    """VmRSS or VmHWM of a process in bytes; 0 where there is no /proc."""
    status = Path(f"/proc/{pid}/status")
    return 1024 * int(status.read_text().split(f"{field}:", 1)[1].split()[0]) if status.is_file() else 0


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

    lines = ["| system | useful tokens/s | s an update | peak above weights |", "|---|---|---|---|"]
    for system in systems:
        speeds, memory = of(system, "tokens_per_second"), of(system, "memory")
        shown = ", ".join(f"{speed:.1f}" for speed in speeds)
        gigabytes = f"{statistics.median(memory) / 1e9:.2f} GB" if memory else "not known"
        each = statistics.median(of(system, "seconds_per_update"))
        lines.append(f"| {system} | {statistics.median(speeds):.1f} ({shown}) | {each:.2f} | {gigabytes} |")
    speeds, memories = (
        [statistics.median(of(name, field) or [0]) for name in systems] for field in ("tokens_per_second", "memory")
    )
    ratio = f"{memories[0] / memories[-1]:.2f}" if memories[-1] else "not known"
    lines.append(f"| ratio | {speeds[0] / speeds[-1]:.2f} | | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vs", choices=[name for name in SYSTEMS if name != "mlx-fish"], default="trainer")
    parser.add_argument("--model", default="tiny", help="a folder, a Hub id or `tiny`")
    parser.add_argument("--backend", default="torch", help="of mlx-fish")
    parser.add_argument("--updates", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each system, in turn")
    parser.add_argument("--json", type=Path, help="also write every run here")
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    if options.updates <= WARM_UPDATES:
        parser.error(f"--updates {options.updates}: more than the {WARM_UPDATES} that are not timed were expected.")
    systems = ("mlx-fish", options.vs)
    measured, setup = [], {}
    for number in range(options.rounds):
        for system in systems:
            run, setup[system] = measure(system, options)
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
        settings = {name: getattr(options, name) for name in ("model", "updates", "batch_size", "rank", "backend")}
        options.json.write_text(json.dumps(record | {"settings": settings}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
