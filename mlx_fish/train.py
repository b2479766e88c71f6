"""The training loop: which update, at which rate, validated and saved when. A backend computes; this room decides.

Nothing here depends on an earlier step but the adapter and its moments: the order of rows is a function of (seed, epoch), the
rate of the step, a dropout key of (seed, step, micro-batch).
"""

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fish import __version__
from mlx_fish.adapter import RUN_FILE, LoraSpec, choose_layers, initial_arrays, peft_config, save_adapter
from mlx_fish.backends import Backend, Sampling, load_backend
from mlx_fish.batches import Batch, Updates, fixed_batches, padding_share
from mlx_fish.checkpoint import save_checkpoint
from mlx_fish.config import TrainConfig
from mlx_fish.data import Dataset, Turn, load_dataset
from mlx_fish.errors import FishError
from mlx_fish.files import write_json, write_text
from mlx_fish.hub import find_model
from mlx_fish.model_card import Tuning, adapter_card, license_of
from mlx_fish.model_folder import ModelFolder, copy_tokenizer
from mlx_fish.report import Report, draw, say
from mlx_fish.run_folder import check_free, prepare
from mlx_fish.schedule import learning_rate
from mlx_fish.template import Template, Tokens, check_name, choose_template, load_tokenizer

SAMPLE_TOKENS = 32
SAMPLE_QUESTION = "金鱼为什么容易浮头？"


@dataclass(frozen=True)
class Plan:
    """All that is decided before a model loads."""

    config: TrainConfig
    folder: ModelFolder
    dataset: Dataset
    template: Template
    rows: list[Tokens]
    valid_rows: list[Tokens]
    spec: LoraSpec
    updates: Updates
    iters: int
    num_blocks: int


def train(config: TrainConfig, *, dry_run: bool = False) -> Path:
    """Run the whole of `mlx-fish train`; returns the output folder.

    Raises:
        FishError: any mistake in the settings, files or rows, before the model loads; a non-finite loss, naming step and rows.
    """
    output = Path(config.output_dir)
    check_name(config.template)
    check_free(output, overwrite=config.overwrite)
    dataset = load_dataset(config.data)
    if not dataset.splits["train"]:
        raise FishError(
            f"--data {config.data} has no training rows (a single file is split 80/10/10 by content); add rows."
        )
    plan = make_plan(config, find_model(config.model), dataset)
    describe(plan)
    if dry_run:
        say("Dry run: nothing was written.")
        return output
    backend = load_backend(plan.folder, lambda text: say(f"! {text}"))
    say(f"  computing   {backend.name} on {backend.device}, {backend.dtype}")
    prepare(output, overwrite=config.overwrite)
    backend.attach(plan.spec, initial_arrays(plan.spec, config.seed), grad_checkpoint=config.grad_checkpoint)
    results = _run(plan, backend, output)
    _close(plan, output, results)
    return output


def make_plan(config: TrainConfig, folder: ModelFolder, dataset: Dataset) -> Plan:
    """Tokenise, choose the layers and count the updates. Loads a tokenizer, no model."""
    layers = choose_layers(folder.linear_layers, target=config.lora_target, num_layers=config.num_layers)
    tokenizer = load_tokenizer(folder)
    template = choose_template(config.template, tokenizer, folder)
    rows = [template.tokens(example, config.max_seq_length) for example in dataset.splits["train"]]
    valid_rows = [template.tokens(example, config.max_seq_length) for example in dataset.splits["valid"]]
    updates = Updates(rows, batch_size=config.batch_size, accumulation=config.grad_accumulation, seed=config.seed)
    iters = config.iters or max(1, math.ceil(config.epochs * updates.per_epoch))
    limit = config.eval_rows or (
        len(valid_rows) if iters >= updates.per_epoch else max(4, len(valid_rows) * iters // updates.per_epoch)
    )
    return Plan(
        config=config,
        folder=folder,
        dataset=dataset,
        template=template,
        rows=rows,
        valid_rows=valid_rows[:limit],
        spec=LoraSpec.uniform(layers, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout),
        updates=updates,
        iters=iters,
        num_blocks=1 + max(int(module.split(".")[2]) for module in folder.linear_layers),
    )


def describe(plan: Plan) -> None:
    """Say what is trained on what."""
    parameters, trainable = plan.folder.num_parameters, plan.spec.num_parameters
    tokens = sum(len(row.ids) for row in plan.rows)
    supervised = sum(row.num_supervised for row in plan.rows)
    padding = padding_share(plan.updates, min(plan.iters, plan.updates.per_epoch))
    cut = [row.where for row in plan.rows + plan.valid_rows if row.cut]
    config = plan.config
    say(f"  model       {plan.folder.name}, {parameters / 1e6:.1f} M parameters")
    say(
        f"  adapter     LoRA rank {config.lora_rank}, alpha {config.lora_alpha:g}, on {len(plan.spec.layers)} layers: "
        f"{trainable / 1e6:.2f} M trainable ({trainable / parameters:.2%})"
    )
    say(
        f"  data        {plan.dataset.name}: {len(plan.rows)} training rows, {len(plan.valid_rows)} for validation "
        f"(of {len(plan.dataset.splits['valid'])}), template {plan.template.name}"
    )
    say(f"  tokens      {tokens:,} ({supervised / tokens:.0%} supervised), {padding:.1%} padding")
    say(
        f"  run         {plan.iters} updates of {config.batch_size} x {config.grad_accumulation} rows "
        f"({plan.iters / plan.updates.per_epoch:.2f} epochs), learning rate {config.learning_rate:g}, {config.schedule}"
    )
    if cut:
        say(
            f"! {len(cut)} rows are longer than --max-seq-length {config.max_seq_length} and were cut, without an end token: {', '.join(cut[:3])}{'…' if len(cut) > 3 else ''}"
        )
    if not plan.valid_rows:
        say("! no validation rows: the data set is too small to hold some out")


def validate(backend: Backend, batches: list[Batch]) -> float:
    """Mean loss over all supervised tokens of the batches: a sum divided once, never a mean of means."""
    loss = sum(backend.evaluate(batch) for batch in batches)
    return loss / sum(batch.num_supervised for batch in batches)


def sample_answer(backend: Backend, template: Template, end_ids: tuple[int, ...]) -> str:
    """The greedy answer to one fixed question, cut at SAMPLE_TOKENS."""
    prompt = template.prompt_ids((Turn("user", SAMPLE_QUESTION),))
    ids = list(backend.generate(prompt, Sampling(max_tokens=SAMPLE_TOKENS), end_ids))
    text = str(template.tokenizer.decode(ids)).strip().replace("\n", " ")
    return text + ("…" if len(ids) == SAMPLE_TOKENS else "")


def end_ids(plan: Plan) -> tuple[int, ...]:
    return tuple(dict.fromkeys((plan.template.end_token_id, *plan.folder.end_token_ids)))


def dropout_seeds(seed: int, step: int, count: int) -> list[int]:
    """One 32-bit key for each micro-batch of a step."""
    return [int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0]) for number in range(count)]


def _run(plan: Plan, backend: Backend, output: Path) -> dict[str, Any]:
    config = plan.config
    valid = fixed_batches(plan.valid_rows, config.batch_size) if plan.valid_rows else []
    before = sample_answer(backend, plan.template, end_ids(plan))
    report = Report(output, total=plan.iters, per_epoch=plan.updates.per_epoch, logging_steps=config.logging_steps)
    try:
        if valid:
            first = validate(backend, valid)
            report.validated(0, first)
            report.note(f"  validation  {first:.4f} before training")
        _write_run(plan, output, {})
        backend.reset_peak_memory()
        batches = plan.updates[0]
        for step in range(plan.iters):
            rate = learning_rate(
                step, peak=config.learning_rate, total=plan.iters, warmup=config.warmup, schedule=config.schedule
            )
            started = time.monotonic()
            wait = backend.step(batches, rate, dropout_seeds(config.seed, step, len(batches)))
            following = plan.updates[step + 1] if step + 1 < plan.iters else []  # built while the step computes
            result = wait()
            if not result.updated:
                rows = ", ".join(row for batch in batches for row in batch.rows)
                raise FishError(
                    f"step {step + 1}: the loss ({result.loss}) or the gradient's norm ({result.grad_norm}) is not finite, so the adapter "
                    f"was left as it was; lower --learning-rate, and look at the rows {rows}."
                )
            report.update(
                step + 1,
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                tokens=sum(batch.num_tokens for batch in batches),
                seconds=time.monotonic() - started,
                peak=backend.peak_memory(),
            )
            batches = following
            last = step + 1 == plan.iters
            if valid and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
                loss = validate(backend, valid)
                report.validated(step + 1, loss)
                report.note(f"  validation  {loss:.4f} after step {step + 1}")
            if last or (step + 1) % config.save_every == 0:
                _save(plan, backend, output, step + 1)
    finally:
        report.close()
    draw(output, report.losses, report.eval_losses)
    return {
        "before": before,
        "after": sample_answer(backend, plan.template, end_ids(plan)),
        "loss_before": report.eval_losses[0][1] if valid else None,
        "loss_after": report.eval_losses[-1][1] if valid else None,
        "training_losses": [report.losses[0][1], report.losses[-1][1]],
        "tokens_per_second": report.tokens / report.training_seconds,
        "seconds": time.monotonic() - report.started,
        "peak_bytes": backend.peak_memory(),
    }


def _adapter_config(plan: Plan) -> dict[str, Any]:
    return peft_config(
        plan.spec,
        rank=plan.config.lora_rank,
        alpha=plan.config.lora_alpha,
        num_blocks=plan.num_blocks,
        base=plan.folder.name,
        revision=plan.folder.revision,
    )


def _save(plan: Plan, backend: Backend, output: Path, step: int) -> None:
    """A checkpoint, and the same adapter at the top of the folder."""
    arrays = backend.adapter_arrays()
    save_checkpoint(
        output / "checkpoints",
        step,
        adapter=arrays,
        adapter_config=_adapter_config(plan),
        optimizer=backend.optimizer_arrays(),
        state={"data": plan.dataset.hashes, "settings": dataclasses.asdict(plan.config)},
    )
    save_adapter(output, arrays, _adapter_config(plan))


def _write_run(plan: Plan, output: Path, results: dict[str, Any]) -> None:
    """run.json, the tokenizer and the generation config: all that `generate`, `evaluate` and `fuse` need to know."""
    copy_tokenizer(plan.folder.path, output, chat_template=plan.template.jinja)
    generation = {**plan.folder.generation_config, "eos_token_id": list(end_ids(plan))}
    write_json(output / "generation_config.json", generation)
    write_json(output / RUN_FILE, run_record(plan, results))


def run_record(plan: Plan, results: dict[str, Any]) -> dict[str, Any]:
    """What run.json holds."""
    from importlib.metadata import version

    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in ("numpy", "transformers", "mlx", "mlx-lm")},
        "settings": dataclasses.asdict(plan.config),
        "iters": plan.iters,
        "base": {
            "name": plan.folder.name,
            "path": str(plan.folder.path.resolve()),
            "revision": plan.folder.revision,
            "fingerprint": plan.folder.fingerprint,
        },
        "template": {"name": plan.template.name, "end_token_id": plan.template.end_token_id},
        "data": {
            "name": plan.dataset.name,
            "sha256": plan.dataset.hashes,
            "rows": len(plan.rows),
            "splits": {split: len(rows) for split, rows in plan.dataset.splits.items()},
        },
        "results": results,
    }


def _close(plan: Plan, output: Path, results: dict[str, Any]) -> None:
    record = run_record(plan, results)
    write_json(output / RUN_FILE, record)
    write_text(
        output / "README.md",
        adapter_card(Tuning.from_run(record, base=plan.folder.name, license=license_of(plan.folder.path))),
    )
    say(f"\n  {SAMPLE_QUESTION}")
    say(f"  before: {results['before']}")
    say(f"  after:  {results['after']}\n")
    say(
        f"  {results['tokens_per_second']:.0f} tokens/s, peak {results['peak_bytes'] / 1e9:.2f} GB, {results['seconds']:.0f} s; saved in {output}/"
    )
    where = "" if str(output) == "finetuned_model" else f" --adapter {output}"
    say(
        f'\nNext:\n  mlx-fish generate{where} -p "{SAMPLE_QUESTION}"\n  mlx-fish evaluate{where}\n  mlx-fish fuse{where} --to-hf'
    )
