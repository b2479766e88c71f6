"""Predict peak memory and time before training, and suggest settings that fit.

Needs a job (rows, layers, batches) and a machine; loads no model and imports no framework. `train` makes the
same plan first.
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
from mlx_fish.planning.outlook import LargestFit, Outlook
from mlx_fish.tracking.events import say
from mlx_fish.tracking.terminal import size_text

PART_TITLES = {
    "weights": "weights", "adapter": "adapter, AdamW", "activations": "activations", "attention": "attention",
    "loss": "loss", "framework": "torch runtime",
}  # fmt: skip


def plan(config: TrainConfig, *, memory: int | None = None) -> tuple["Plan", list["Plan"]]:
    """Run `mlx-fish plan`.

    Args:
        memory: plan for a machine with this many bytes of memory; None: this machine's own.

    Returns:
        the plan for this machine, and the plans for the known Mac minis.

    Raises:
        FishError: any error that `train` with these settings would raise before it loads the model.
    """
    choose_backend(config.backend)  # before the tokenizer imports transformers
    check_template_name(config.template)
    dataset = load_data(config)  # validate data before locating the model
    job = make_job(config, find_model(config.model), dataset)
    describe(job)
    machine = this_machine(choose_backend(config.backend))
    if memory is not None:
        machine = replace(machine, name=f"a machine with {memory / GIB:g} GB", memory=memory)
    return make_plan(job, machine), mac_minis(job)


def planned(job: Job, *, force: bool = False, resuming: bool = False) -> Job:
    """Print the plan of a job in one line before `train` loads the model, and refuse a job that cannot fit.

    Args:
        force: accept a job that cannot fit.
        resuming: the job resumes an existing run, so the advice differs.

    Returns:
        the job with `--grad-checkpoint auto` resolved, as run.json records it.

    Raises:
        FishError: the job cannot fit; the message suggests settings that do.
    """
    job_plan = make_plan(job)
    say(f"  plan        {summary_line(job_plan)}")
    if not force:
        refuse(job_plan, resuming=resuming)
    return replace(job, config=replace(job.config, grad_checkpoint="on" if job_plan.grad_checkpoint else "off"))


@dataclass(frozen=True)
class Plan:
    """The prediction for one run on one machine.

    Attributes:
        grad_checkpoint: whether the run checkpoints activations, with `auto` resolved.
        peak: predicted peak memory by part, bytes.
        worst: shape of the micro-batch that causes the peak.
        usable: bytes that the run may use; None if the machine's memory is unknown.
        fits: whether the peak is within `usable`; None if that is unknown.
        seconds: estimated training time; None if the machine's speed is unknown.
        largest: the largest settings that fit without and with --grad-checkpoint; None if the memory is
            unknown.
        advice: changes that each make the run fit, least intrusive first; empty if it fits or nothing helps.
        rough: the peak is a guess, not the prediction of a measured model.
    """

    machine: Machine
    backend: str
    grad_checkpoint: bool
    peak: Peak
    worst: Shape
    usable: int | None
    fits: bool | None
    seconds: float | None
    largest: tuple[LargestFit, LargestFit] | None
    advice: tuple[str, ...]
    rough: bool

    @property
    def cannot_fit(self) -> bool:
        """Whether the run is certain not to fit. Of a rough peak, only the size of the weights is certain."""
        if self.usable is None:
            return False
        return (self.peak.weights if self.rough else self.peak.total) > self.usable


def make_plan(job: Job, machine: Machine | None = None) -> Plan:
    """Return the plan of a job on `machine`, by default on this machine."""
    backend = choose_backend(job.config.backend)
    return _plan(Outlook(job, machine or this_machine(backend), backend))


def _plan(outlook: Outlook) -> Plan:
    setting = outlook.job.config.grad_checkpoint
    grad_checkpoint = setting == "on" or (setting == "auto" and _needs_checkpointing(outlook))
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
    """Return the plans of the same run with MLX on Metal, one for each known Mac mini."""
    return [_plan(Outlook(job, mini, "mlx")) for mini in MAC_MINIS]


def summary_line(plan: Plan) -> str:
    """Return the plan in one line, for the header of a run."""
    limit = f" of {size_text(plan.usable)} usable" if plan.usable is not None else ""
    summary = f"peak about {size_text(plan.peak.total)}{limit}"
    if plan.rough:
        summary += " (a rough guess for torch)"
    if plan.seconds is not None:
        summary += f", about {duration(plan.seconds)}"
    return summary + (", --grad-checkpoint on" if plan.grad_checkpoint else "")


def refuse(plan: Plan, *, resuming: bool = False) -> None:
    """Refuse a run that cannot fit.

    Raises:
        FishError: the run cannot fit; the message suggests settings that do.
    """
    if not plan.cannot_fit:
        return
    assert plan.usable is not None
    if resuming:
        remedy = "resume on a machine with more memory, or start a new run with smaller settings and --overwrite"
    elif plan.advice:
        remedy = f"any one of these changes makes it fit: {'; '.join(plan.advice)}"
    else:
        remedy = "use a smaller model"
    raise FishError(
        f"this run needs about {size_text(plan.peak.total)} ({size_text(plan.peak.weights)} of it weights), but only "
        f"{size_text(plan.usable)} is usable on {plan.machine.name}; {remedy}; "
        "see `mlx-fish plan` for details, or try anyway with --force."
    )


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _needs_checkpointing(outlook: Outlook) -> bool:
    """Return whether the run needs checkpointing and benefits from it; torch cannot combine it with dropout."""
    usable = outlook.machine.usable
    if usable is None or (outlook.backend == "torch" and outlook.job.config.lora_dropout):
        return False
    peak_without, peak_with = (outlook.peak(grad_checkpoint=choice)[0].total for choice in (False, True))
    # The peak may be a validation batch, which keeps no activations: then checkpointing does not help.
    return peak_without > usable and peak_with < peak_without


def _advice(outlook: Outlook, grad_checkpoint: bool) -> Iterator[str]:
    """Yield changes that each make the run fit, according to the memory model."""
    config = outlook.job.config
    rows_per_update = config.batch_size * config.grad_accumulation
    for checkpoint in (grad_checkpoint,) if grad_checkpoint else (False, True):
        prefix = "--grad-checkpoint on " if checkpoint and config.grad_checkpoint != "on" else ""
        batch_size = outlook.largest_batch(grad_checkpoint=checkpoint)
        if outlook.validation_fits():
            if prefix and outlook.run_fits(grad_checkpoint=True):
                yield prefix.strip()
                continue
            if smaller_batch := min(batch_size, config.batch_size - 1):
                accumulation = math.ceil(rows_per_update / smaller_batch)
                yield f"{prefix}--batch-size {smaller_batch} --grad-accumulation {accumulation}"
        for size in dict.fromkeys((config.batch_size, 1)):
            length = outlook.largest_length(grad_checkpoint=checkpoint, batch_size=size)
            if length >= 64 and outlook.validation_fits(length):
                batch_flags = (
                    "" if size == config.batch_size else f"--batch-size 1 --grad-accumulation {rows_per_update} "
                )
                yield f"{prefix}{batch_flags}--max-seq-length {length}"
                break
    quantisable = outlook.backend == "mlx" and not outlook.job.folder.quantization
    if quantisable and outlook.fits_with_four_bit_base(grad_checkpoint=grad_checkpoint):
        yield "a 4-bit base (`mlx-fish convert -q 4`)"


def as_json(plan: Plan, minis: list[Plan]) -> dict[str, Any]:
    """Return the plans as one JSON-serialisable object, in bytes and seconds, with None for unknown values."""
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
    """Return the plans as human-readable text."""
    worst = plan.worst
    lines = [
        f"peak memory {size_text(plan.peak.total):>13}   {_verdict(plan)}",
        *(f"  {title:18}{size:>7}" for title, size in _part_sizes(plan.peak)),
        f"  at its largest micro-batch: {worst.rows} rows of up to {worst.width} tokens, {worst.tokens} computed, {worst.labels} labels"
        f"{', blocks recomputed in the backward pass (--grad-checkpoint on)' if plan.grad_checkpoint else ''}",
    ]
    if plan.rough:
        lines.append("  ! a rough guess: the memory model was fitted to MLX only")
    if plan.largest:
        off, on = plan.largest
        lines += [
            "",
            f"{'largest that fits':22}{'without':>10}{'with --grad-checkpoint on':>28}",
            f"  {'--batch-size':20}{off.batch_size:>10,}{on.batch_size:>28,}",
            f"  {'tokens per row':20}{off.length:>10,}{on.length:>28,}",
        ]
    lines += ["", f"time  {_time_text(plan)}"]
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
        return f"(the memory of {plan.machine.name} is unknown)"
    return f"{'fits' if plan.fits else 'does not fit'}: {size_text(plan.usable)} usable on {plan.machine.name}"


def _time_text(plan: Plan) -> str:
    if plan.seconds is None:
        return f"unknown: no speed figures for {plan.machine.name}"
    assert plan.machine.flops is not None and plan.machine.bandwidth is not None
    speed = f"{plan.machine.flops / 1e9:,.0f} GFLOP/s and {plan.machine.bandwidth / 1e9:.0f} GB/s"
    return f"about {duration(plan.seconds)}, an estimate from operations and bytes at {speed}"


def _part_sizes(peak: Peak) -> list[tuple[str, str]]:
    """Return (title, size) of every part. Some parts hold nothing at the moment of peak memory."""
    sizes = [
        (title, getattr(peak, name)) for name, title in PART_TITLES.items() if name != "framework" or peak.framework
    ]
    return [(title, size_text(size) if size else "freed before the peak") for title, size in sizes]
