"""What `bench.py`'s systems compute: the model's folder, the rows, the adapter's start and the updates, the same for each."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fish.adapters.spec import AdapterSpec, choose_layers, initial_arrays
from mlx_fish.backends.choose import choose_backend
from mlx_fish.config import TrainConfig
from mlx_fish.data.dataset import load_dataset
from mlx_fish.data.order import Updates
from mlx_fish.data.templates.template import choose_template
from mlx_fish.data.templates.tokenizer import load_tokenizer
from mlx_fish.data.tokens import Tokens
from mlx_fish.models.folder import TOKENIZER_FILES, ModelFolder
from mlx_fish.models.hub import find_model
from mlx_fish.storage.files import write_json
from mlx_fish.storage.tensors import NAMES, ShardWriter, Slot

WARM_UPDATES = 3  # not timed, and the same rows for every system
MAX_LENGTH = 2048
SUPERVISED_SHARE = 0.57  # of a synthetic row: that of the fish data
DEFAULTS = TrainConfig()

Report = Callable[..., None]
"""`report(event, wait=False, **values)` sends an event to the process that measures; `wait` until it answers."""


@dataclass(frozen=True)
class Task:
    """What every system computes: `updates` lists the rows of each, as mlx-fish orders them."""

    folder: ModelFolder
    rows: list[Tokens]
    spec: AdapterSpec
    updates: Updates
    backend: str
    grad_checkpoint: bool

    @property
    def initial(self) -> dict[str, Any]:
        return initial_arrays(self.spec, DEFAULTS.seed)

    def rows_of(self, step: int) -> list[Tokens]:
        """The rows that mlx-fish trains on in update `step`, counted from 0."""
        by_place = {row.where: row for row in self.rows}
        return [by_place[name] for batch in self.updates[step] for name in batch.rows]


def make_task(options: argparse.Namespace) -> Task:
    choose_backend(options.backend)  # before transformers is imported
    folder = find_model(options.model)
    number = options.updates * options.batch_size
    rows = synthetic_rows(folder, number, options.length) if options.length else fish_rows(folder, number)
    spec = AdapterSpec.uniform(choose_layers(folder.linear_layers), rank=options.rank, alpha=2 * options.rank)
    updates = Updates(rows, batch_size=options.batch_size, accumulation=1, seed=DEFAULTS.seed, packing=options.packing)
    return Task(folder, rows, spec, updates, options.backend, options.grad_checkpoint)


def fish_rows(folder: ModelFolder, number: int | None = None) -> list[Tokens]:
    """The first training rows of the fish data [default: all]."""
    template = choose_template("auto", load_tokenizer(folder), folder)
    examples = load_dataset("fish_care").splits["train"][:number]
    return [template.tokens(example, MAX_LENGTH) for example in examples]


def synthetic_rows(folder: ModelFolder, number: int, length: int) -> list[Tokens]:
    """Rows of exactly `length` ids, cut from the fish data's text end to end (and again from its start); each row's last ids are
    supervised."""
    tokenizer = load_tokenizer(folder)
    text = "\n".join(turn.content for example in load_dataset("fish_care").splits["train"] for turn in example.turns)
    ids = np.resize(np.array(tokenizer.encode(text, add_special_tokens=False), np.int32), (number, length))
    supervised = np.arange(length) >= length - max(1, round(SUPERVISED_SHARE * length))
    return [Tokens(row, supervised, f"synthetic:{index}", False) for index, row in enumerate(ids)]


@contextmanager
def first_blocks(folder: ModelFolder, number: int | None) -> Iterator[ModelFolder]:
    """A model of the first `number` blocks, in a temporary folder; None: the model as it is."""
    if not number:
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        write_first_blocks(folder, Path(place), number)
        yield ModelFolder(Path(place), folder.name)


def write_lines(options: argparse.Namespace, lines: Sequence[Any]) -> None:
    """With --json, the options and a table's lines."""
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        record = {"settings": settings, "lines": [asdict(line) for line in lines]}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_first_blocks(source: ModelFolder, target: Path, number: int) -> None:
    """A model folder of the first `number` blocks of another: the real vocabulary with little depth."""
    known = int(source.config["num_hidden_layers"])
    if not 1 <= number <= known:
        raise SystemExit(f"--layers {number}: {source.name} has {known} blocks; give 1 to {known}.")
    dropped = tuple(f"model.layers.{block}." for block in range(number, known))
    kept = [info for name, info in source.weights.items() if not name.startswith(dropped)]
    unread = {info.dtype for info in kept} - set(NAMES)
    if unread:
        raise SystemExit(f"--layers cuts float weights, and {source.name} holds {', '.join(sorted(unread))}.")
    writer = ShardWriter(target, [Slot(info.name, info.dtype, info.shape) for info in kept])
    for info in kept:
        writer.put([source.weights.raw(info.name)])
    writer.close()
    write_json(target / "config.json", source.config | {"num_hidden_layers": number})
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source.path / name).is_file():
            shutil.copy(source.path / name, target)
