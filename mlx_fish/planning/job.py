"""Decide everything that a run needs before a model loads: tokenised rows, layers to adapt, number of updates.

Loads a tokenizer, but no model.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mlx_fish.adapters.spec import AdapterSpec, choose_layers, count_blocks
from mlx_fish.config import TrainConfig
from mlx_fish.data.dataset import Dataset, load_dataset
from mlx_fish.data.examples import Mistakes, Turn
from mlx_fish.data.order import Updates, padding_share
from mlx_fish.data.templates.template import Template, choose_template
from mlx_fish.data.templates.tokenizer import load_tokenizer
from mlx_fish.data.tokens import Tokens
from mlx_fish.errors import FishError
from mlx_fish.models.folder import ModelFolder
from mlx_fish.objectives import OBJECTIVES, Objective
from mlx_fish.tracking.events import say


@dataclass(frozen=True)
class Job:
    """Everything about a run that is decided before a model loads.

    Attributes:
        rows: tokenised training rows.
        valid_rows: tokenised rows of each validation, the first of the `num_valid_rows` available.
        spec: the layers to adapt, with rank and scale.
        iters: number of optimizer updates.
        num_blocks: transformer blocks of the model, adapted or not.
        skipped: broken rows that were left out (`--skip-bad-rows`).
        sample: the turns of the prompt that is answered before and after training: the data set's sample
            question if it has one, else the prompt of a validation row, else of a training row.
    """

    config: TrainConfig
    folder: ModelFolder
    dataset: Dataset
    template: Template
    rows: list[Tokens]
    valid_rows: list[Tokens]
    num_valid_rows: int
    spec: AdapterSpec
    objective: Objective
    updates: Updates
    iters: int
    num_blocks: int
    skipped: Mistakes
    sample: tuple[Turn, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the token ids and loss masks of all rows, in order.

        It identifies the combination of data, tokenizer and template.
        """
        digest = hashlib.sha256()
        for row in self.rows + self.valid_rows:
            digest.update(
                len(row.ids).to_bytes(4, "little") + row.ids.astype("<i4").tobytes() + row.supervised.tobytes()
            )
        return digest.hexdigest()


def load_data(config: TrainConfig, found_at: Path | None = None) -> Dataset:
    """Load the data set.

    Args:
        found_at: the path from which an earlier part of the run loaded it, see `load_dataset`.

    Raises:
        FishError: the data cannot be read, or have no training rows.
    """
    kind = OBJECTIVES[config.stage].rows
    dataset = load_dataset(config.data, kind=kind, skip_bad_rows=config.skip_bad_rows, found_at=found_at)
    if not dataset.splits["train"]:
        raise _no_rows_error(config)
    return dataset


def _no_rows_error(config: TrainConfig) -> FishError:
    return FishError(
        f"--data {config.data} has no training rows (a single file is split 80/10/10 by content); add rows."
    )


def make_job(config: TrainConfig, folder: ModelFolder, dataset: Dataset) -> Job:
    """Tokenise the rows, choose the layers and count the updates. Loads a tokenizer, but no model.

    Raises:
        FishError: the settings do not fit the model; or rows do not fit the template or the length limit, all
            reported together.
    """
    objective = OBJECTIVES[config.stage]
    layers = choose_layers(folder.linear_layers, target=config.lora_target, num_layers=config.num_layers)
    tokenizer = load_tokenizer(folder)
    template = choose_template(objective.template or config.template, tokenizer, folder)
    skipped = replace(dataset.skipped, first=list(dataset.skipped.first))
    rows, valid_rows = (
        objective.tokenise(dataset.splits[name], template, config.max_seq_length, skipped)
        for name in ("train", "valid")
    )
    if not config.skip_bad_rows:
        skipped.refuse()
    _check_ids(rows + valid_rows, folder)
    if not rows:
        raise _no_rows_error(config)
    updates = Updates(
        rows,
        batch_size=config.batch_size,
        accumulation=config.grad_accumulation,
        seed=config.seed,
        collate=objective.collate,
        packing=config.packing and not folder.attends_in_windows,  # the packed attention grid has no sliding window
    )
    iters = config.iters or max(1, math.ceil(config.epochs * updates.per_epoch))
    limit = config.eval_rows or (
        len(valid_rows) if iters >= updates.per_epoch else max(4, len(valid_rows) * iters // updates.per_epoch)
    )
    return Job(
        config=config,
        folder=folder,
        dataset=dataset,
        template=template,
        rows=rows,
        valid_rows=valid_rows[:limit],
        num_valid_rows=len(valid_rows),
        spec=AdapterSpec.uniform(
            layers,
            kind="rslora" if config.use_rslora else "lora",
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
        ),
        objective=objective,
        updates=updates,
        iters=iters,
        num_blocks=count_blocks(folder.linear_layers),
        skipped=skipped,
        sample=_sample(dataset, objective),
    )


def _sample(dataset: Dataset, objective: Objective) -> tuple[Turn, ...]:
    """Choose the prompt that is answered before and after training."""
    if dataset.sample_questions:
        return (Turn("user", dataset.sample_questions[0]),)
    return objective.opening((dataset.splits["valid"] or dataset.splits["train"])[0])


def _check_ids(rows: Sequence[Tokens], folder: ModelFolder) -> None:
    """Check that every token id has an embedding; tokens that were added to the tokenizer alone have none."""
    vocab_size = int(folder.config["vocab_size"])
    for row in rows:
        if (max_id := int(row.ids.max())) >= vocab_size:
            raise FishError(
                f"{row.where} contains token id {max_id}, but {folder.name} has only {vocab_size} embeddings; "
                "use the tokenizer that belongs to the model."
            )


def say_cut(rows: Sequence[Tokens], max_length: int) -> None:
    """Warn about rows whose answers were truncated: they must not pass for complete in training or evaluation."""
    if truncated := [row.where for row in rows if row.cut]:
        say(
            f"! {len(truncated)} rows are longer than --max-seq-length {max_length} and were truncated, "
            f"without an end token: {', '.join(truncated[:3])}{'…' if len(truncated) > 3 else ''}"
        )


def describe(job: Job) -> None:
    """Print the model, the adapter, the data and the schedule of a run, with warnings."""
    parameters, trainable = job.folder.num_parameters, job.spec.num_parameters
    tokens = sum(len(row.ids) for row in job.rows)
    supervised = sum(row.num_supervised for row in job.rows)
    padding = padding_share(job.updates, min(job.iters, job.updates.per_epoch))
    config = job.config
    say(f"  model       {job.folder.name}, {parameters / 1e6:.1f} M parameters")
    say(
        f"  adapter     {'rsLoRA' if config.use_rslora else 'LoRA'} rank {config.lora_rank}, alpha {config.lora_alpha:g}, on {len(job.spec.layers)} layers: "
        f"{trainable / 1e6:.2f} M trainable ({trainable / parameters:.2%})"
    )
    say(
        f"  data        {job.dataset.name}: {len(job.rows)} training rows, {len(job.valid_rows)} for validation "
        f"(of {job.num_valid_rows}), template {job.template.name}"
    )
    say(f"  tokens      {tokens:,} ({supervised / tokens:.0%} supervised), {padding:.1%} padding")
    say(
        f"  run         {job.iters} updates of {config.batch_size} x {config.grad_accumulation} rows "
        f"({job.iters / job.updates.per_epoch:.2f} epochs), learning rate {config.learning_rate:g}, {config.schedule}"
    )
    if config.packing and not job.updates.packing:
        say(f"! {job.folder.name} uses sliding-window attention, so rows are padded, not packed")
    say_cut(job.rows + job.valid_rows, config.max_seq_length)
    if config.warmup > job.iters:
        say(f"! --warmup {config.warmup} is longer than the run, so the learning rate never reaches its peak")
    if job.skipped.count:
        say(f"! {job.skipped.count} broken rows are skipped; the first: {job.skipped.first[0]}")
    if not job.valid_rows:
        say("! no validation rows: the data set is too small to hold any out")


def sample_question(job: Job) -> str:
    """Return the question that is answered before and after training, on one line."""
    return " ".join(job.sample[-1].content.split())


def end_ids(job: Job) -> tuple[int, ...]:
    """Return the token ids that end an answer: the template's end token, then the model's own."""
    return tuple(dict.fromkeys((job.template.end_token_id, *job.folder.end_token_ids)))
