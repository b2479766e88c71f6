"""The systems that `bench.py` measures: each trains the same task in a process of its own and reports every update.

A new one is a function `run(task, report)` more in SYSTEMS.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from bench_mlx_lm import MlxMemory, run_mlx_lm, run_mlx_lm_ours
from bench_task import DEFAULTS, WARM_UPDATES, Report, Task, make_task

from mlx_fish.backends.protocol import optimizer_step
from mlx_fish.data.tokens import Tokens


def run_mlx_fish(task: Task, report: Report) -> None:
    from mlx_fish.backends.choose import load_backend

    backend = load_backend(task.folder, name=task.backend)
    mlx_memory = MlxMemory() if backend.name == "mlx" else None
    backend.attach(task.spec, task.initial, grad_checkpoint=task.grad_checkpoint)
    if backend.name == "torch":
        touch_weights(backend.model)  # type: ignore[attr-defined]
    report("loaded", wait=True, device=backend.device, dtype=backend.dtype)
    if mlx_memory is None:
        backend.reset_peak_memory()
    before = backend.peak_memory()
    for step in range(task.updates.per_epoch):
        batches = task.updates[step]
        result = optimizer_step(backend, batches, DEFAULTS.learning_rate, [0])()
        tokens, computed = (sum(getattr(batch, name) for batch in batches) for name in ("num_tokens", "num_computed"))
        report("update", loss=result.loss, tokens=tokens, computed=computed)
    if mlx_memory is not None:
        memory = mlx_memory.above_weights()
    else:
        memory = None if backend.device == "cpu" else backend.peak_memory() - before
    report("done", wait=True, memory=memory)


def run_trainer(task: Task, report: Report) -> None:
    """transformers' Trainer with PEFT: batches padded to their longest row, logits of every position."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from mlx_fish.backends.torch import memory
    from mlx_fish.backends.torch.model import choose_device, choose_dtype

    device = choose_device()
    dtype = choose_dtype(task.folder.weights.dtype, device)
    model = AutoModelForCausalLM.from_pretrained(task.folder.path, dtype=dtype).to(device)
    rank = next(iter(task.spec.layers.values())).rank
    targets = sorted({module.rsplit(".", 1)[-1] for module in task.spec.layers})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    initial = task.initial
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # the same start
            parameter.data = torch.tensor(initial[name.replace(".default", "")]).to(device, parameter.dtype)
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
            lengths = [len(row.ids) for row in done]
            tokens, computed = sum(lengths) - len(done), len(done) * max(lengths)
            report("update", loss=losses[-1], tokens=tokens, computed=computed)

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
            gradient_checkpointing=task.grad_checkpoint,
            use_cpu=device.type == "cpu",
        )
        trainer = InOrder(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Reporter()]
        )
        touch_weights(model)
        report("loaded", wait=True, device=device.type, dtype=str(dtype).removeprefix("torch."))
        memory.reset(device)
        before = memory.peak(device)
        trainer.train()
        report("done", wait=True, memory=None if device.type == "cpu" else memory.peak(device) - before)


SYSTEMS: dict[str, Callable[[Task, Report], None]] = {
    "mlx-fish": run_mlx_fish,
    "trainer": run_trainer,
    "mlx-lm": run_mlx_lm,
    "mlx-lm-ours": run_mlx_lm_ours,
}


def trainer_order(task: Task) -> list[Tokens]:
    """The rows of mlx-fish's first updates, then the others shuffled: what is timed has no order by length."""
    first = [row for step in range(WARM_UPDATES) for row in task.rows_of(step)]
    rest = [row for step in range(WARM_UPDATES, task.updates.per_epoch) for row in task.rows_of(step)]
    return first + [rest[index] for index in np.random.default_rng(DEFAULTS.seed).permutation(len(rest))]


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

    SYSTEMS[options.system](make_task(options), report)
