"""What a run will take, told before it: peak memory by part, whether that fits, the time, and what would fit instead.

Knows a job (rows, layers, batches) and a machine; loads no model and imports no framework. `train` asks the same question first.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlx_fish.backends.choose import choose_backend
from mlx_fish.config import TrainConfig
from mlx_fish.data.templates.template import check_template_name
from mlx_fish.errors import FishError
from mlx_fish.models.hub import find_model
from mlx_fish.planning.job import Job, describe, load_data, make_job
from mlx_fish.planning.machine import GIB, MAC_MINIS, Machine, this_machine
from mlx_fish.planning.memory import Peak, Shape
from mlx_fish.planning.outlook import Largest, Outlook
from mlx_fish.tracking.events import say
from mlx_fish.tracking.terminal import size_text

PARTS = {
    "weights": "weights", "adapter": "adapter, AdamW", "activations": "activations", "attention": "attention",
    "loss": "loss", "framework": "torch itself",
}  # fmt: skip


def plan(config: TrainConfig, *, memory: int | None = None) -> tuple["Plan", list["Plan"]]:
    """Run the whole of `mlx-fish plan`: the plan on this machine (as if it had `memory` bytes), and those on the Mac minis known.

    Raises:
        FishError: any mistake that `train` with these settings would find before it loads the model.
    """
    choose_backend(config.backend)  # before the tokenizer imports transformers
    check_template_name(config.template)
    dataset = load_data(config)  # its mistakes are told before a model is looked for
    job = make_job(config, find_model(config.model), dataset)
    describe(job)
    machine = this_machine(choose_backend(config.backend))
    if memory is not None:
        machine = replace(machine, name=f"a machine with {memory / GIB:g} GB", memory=memory)
    return make_plan(job, machine), mac_minis(job)


def planned(job: Job, *, force: bool = False, resuming: bool = False) -> Job:
    """What `train` does with a job before the model loads: say its plan in a line, and refuse what cannot fit, unless forced.

    Returns:
        the job with `--grad-checkpoint auto` decided, as run.json records it.

    Raises:
        FishError: it cannot fit; with what would.
    """
    found = make_plan(job)
    say(f"  plan        {line(found)}")
    if not force:
        refuse(found, resuming=resuming)
    return replace(job, config=replace(job.config, grad_checkpoint="on" if found.grad_checkpoint else "off"))


@dataclass(frozen=True)
class Plan:
    """What is told of a run.

    Attributes:
        grad_checkpoint: asked for, or with `auto` that memory needs it.
        worst: the micro-batch that causes the peak.
        usable: bytes that the run may take; None where the memory is not known.
        fits: None where that is not known.
        seconds: an estimate; None where the machine's speed is not known.
        largest: what fits without and with --grad-checkpoint; None where the memory is not known.
        advice: changes of which each alone makes the run fit, most welcome first; empty when it fits, or nothing helps.
        rough: the peak is a guess, not a model that was measured.
    """

    machine: Machine
    backend: str
    grad_checkpoint: bool
    peak: Peak
    worst: Shape
    usable: int | None
    fits: bool | None
    seconds: float | None
    largest: tuple[Largest, Largest] | None
    advice: tuple[str, ...]
    rough: bool

    @property
    def must_be_refused(self) -> bool:
        """Known not to fit. A rough peak proves nothing, but the weights are what they are."""
        if self.usable is None:
            return False
        return (self.peak.weights if self.rough else self.peak.total) > self.usable


def make_plan(job: Job, machine: Machine | None = None) -> Plan:
    """The plan of a job, on this machine unless another one is given."""
    backend = choose_backend(job.config.backend)
    return _plan(Outlook(job, machine or this_machine(backend), backend))


def _plan(outlook: Outlook) -> Plan:
    asked = outlook.job.config.grad_checkpoint
    grad_checkpoint = asked == "on" or (asked == "auto" and _needs_checkpointing(outlook))
    peak, worst = outlook.peak(grad_checkpoint=grad_checkpoint)
    usable = outlook.machine.usable
    fits = None if usable is None else peak.total <= usable
    return Plan(
        machine=outlook.machine,
        backend=outlook.backend,
        grad_checkpoint=grad_checkpoint,
        peak=peak,
        worst=worst,
        usable=usable,
        fits=fits,
        seconds=outlook.seconds(grad_checkpoint=grad_checkpoint),
        largest=None
        if usable is None
        else (outlook.largest(grad_checkpoint=False), outlook.largest(grad_checkpoint=True)),
        advice=tuple(_advice(outlook, grad_checkpoint)) if fits is False else (),
        rough=outlook.rough,
    )


def mac_minis(job: Job) -> list[Plan]:
    """The same run in MLX on Metal, on each Mac mini known."""
    return [_plan(Outlook(job, mini, "mlx")) for mini in MAC_MINIS]


def line(plan: Plan) -> str:
    """The plan in one line, for the head of a run."""
    of = f" of {size_text(plan.usable)} usable" if plan.usable is not None else ""
    text = f"peak about {size_text(plan.peak.total)}{of}"
    if plan.rough:
        text += " (a rough guess for torch)"
    if plan.seconds is not None:
        text += f", about {duration(plan.seconds)}"
    return text + (", --grad-checkpoint on" if plan.grad_checkpoint else "")


def refuse(plan: Plan, *, resuming: bool = False) -> None:
    """
    Raises:
        FishError: the run cannot fit, with what would.
    """
    if not plan.must_be_refused:
        return
    assert plan.usable is not None
    if resuming:
        todo = "go on where there is more memory, or start anew with smaller settings and --overwrite"
    elif plan.advice:
        todo = f"any of these fits: {'; '.join(plan.advice)}"
    else:
        todo = "take a smaller model"
    raise FishError(
        f"this run would hold about {size_text(plan.peak.total)} ({size_text(plan.peak.weights)} of it weights), and "
        f"{size_text(plan.usable)} are usable on {plan.machine.name}; {todo}; `mlx-fish plan` tells more, --force tries all the same."
    )


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _needs_checkpointing(outlook: Outlook) -> bool:
    """Whether it does not fit without, and checkpointing can be had: torch has none beside dropout."""
    usable = outlook.machine.usable
    if usable is None or (outlook.backend == "torch" and outlook.job.config.lora_dropout):
        return False
    without, with_it = (outlook.peak(grad_checkpoint=choice)[0].total for choice in (False, True))
    return without > usable and with_it < without  # a validation may be the peak, which keeps no activations anyway


def _advice(outlook: Outlook, grad_checkpoint: bool) -> Iterator[str]:
    """Changes of which each makes the run fit, as the model says."""
    config = outlook.job.config
    rows = config.batch_size * config.grad_accumulation
    for checkpoint in (grad_checkpoint,) if grad_checkpoint else (False, True):
        also = "--grad-checkpoint on " if checkpoint and config.grad_checkpoint != "on" else ""
        batch_size = outlook.largest_batch(grad_checkpoint=checkpoint)
        if outlook.validation_fits():
            if also and outlook.fits_as_it_is(grad_checkpoint=True):
                yield also.strip()
                continue
            if fewer := min(batch_size, config.batch_size - 1):
                yield f"{also}--batch-size {fewer} --grad-accumulation {math.ceil(rows / fewer)}"
        for size in dict.fromkeys((config.batch_size, 1)):
            length = outlook.largest_length(grad_checkpoint=checkpoint, batch_size=size)
            if length >= 64 and outlook.validation_fits(length):
                smaller = "" if size == config.batch_size else f"--batch-size 1 --grad-accumulation {rows} "
                yield f"{also}{smaller}--max-seq-length {length}"
                break
    plain = outlook.backend == "mlx" and not outlook.job.folder.quantization
    if plain and outlook.fits_in_four_bits(grad_checkpoint=grad_checkpoint):
        yield "a base in 4 bits (`mlx-fish convert -q 4`)"


def as_json(plan: Plan, minis: list[Plan]) -> dict[str, Any]:
    """One object: bytes and seconds as numbers, None for what is not known."""
    return {
        "peak_bytes": {**asdict(plan.peak), "total": plan.peak.total},
        "usable_bytes": plan.usable,
        "fits": plan.fits,
        "rough": plan.rough,
        "machine": asdict(plan.machine),
        "backend": plan.backend,
        "grad_checkpoint": "on" if plan.grad_checkpoint else "off",
        "worst_batch": asdict(plan.worst),
        "largest": plan.largest and dict(zip(("off", "on"), map(asdict, plan.largest), strict=True)),
        "estimated_seconds": plan.seconds,
        "advice": list(plan.advice),
        "mac_minis": [
            {
                "name": mini.machine.name,
                "peak_bytes": mini.peak.total,
                "usable_bytes": mini.usable,
                "fits": mini.fits,
                "grad_checkpoint": "on" if mini.grad_checkpoint else "off",
                "estimated_seconds": mini.seconds,
            }
            for mini in minis
        ],
    }


def text(plan: Plan, minis: list[Plan]) -> str:
    """The plan for a person."""
    worst = plan.worst
    lines = [
        f"peak memory {size_text(plan.peak.total):>13}   {_verdict(plan)}",
        *(f"  {title:18}{size:>7}" for title, size in _parts(plan.peak)),
        f"  at its largest micro-batch: {worst.rows} rows of up to {worst.width} tokens, {worst.tokens} computed, {worst.labels} labels"
        f"{', blocks computed twice (--grad-checkpoint on)' if plan.grad_checkpoint else ''}",
    ]
    if plan.rough:
        lines.append("  ! a rough guess: only MLX's memory was measured and modelled")
    if plan.largest:
        off, on = plan.largest
        lines += [
            "",
            f"{'largest that fits':22}{'without':>10}{'with --grad-checkpoint on':>28}",
            f"  {'--batch-size':20}{off.batch_size:>10,}{on.batch_size:>28,}",
            f"  {'tokens in a row':20}{off.length:>10,}{on.length:>28,}",
        ]
    lines += ["", f"time  {_time(plan)}"]
    if plan.advice:
        lines += ["", "any of these would fit:", *(f"  {advice}" for advice in plan.advice)]
    if minis:
        lines += ["", "on Metal, by the same formulas (not measured there):"]
        lines += [
            f"  {mini.machine.name:20}peak {size_text(mini.peak.total)} of {size_text(mini.usable or 0)} usable: "
            f"{'fits' if mini.fits else 'does not fit'}{' with --grad-checkpoint on' if mini.grad_checkpoint else ''}, "
            f"about {duration(mini.seconds or 0.0)}"
            for mini in minis
        ]
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    if plan.usable is None:
        return f"(the memory of {plan.machine.name} is not known)"
    return f"{'fits' if plan.fits else 'does not fit'}: {size_text(plan.usable)} are usable on {plan.machine.name}"


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        return f"unknown: no figures for {plan.machine.name}"
    assert plan.machine.flops is not None and plan.machine.bandwidth is not None
    speed = f"{plan.machine.flops / 1e9:,.0f} GFLOP/s and {plan.machine.bandwidth / 1e9:.0f} GB/s"
    return f"about {duration(plan.seconds)}, an estimate from operations and bytes at {speed}"


def _parts(peak: Peak) -> list[tuple[str, str]]:
    """Every part by its title; some hold nothing at the moment when most is held."""
    sizes = [(title, getattr(peak, name)) for name, title in PARTS.items() if name != "framework" or peak.framework]
    return [(title, size_text(size) if size else "freed by then") for title, size in sizes]
