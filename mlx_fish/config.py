"""The settings of a training run. This dataclass is the one source of flags, YAML keys, defaults and their documentation.

Knows nothing of how a setting is used. Names that LLaMA-Factory's users type are accepted beside ours.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_fish.errors import FishError, did_you_mean

SCHEDULES = ("linear", "cosine", "constant")
BACKENDS = ("auto", "mlx", "torch")
STAGES = ("sft", "pt")
SWITCH = ("auto", "on", "off")


def setting(
    default: Any,
    help: str,
    *,
    also: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    bare: str | None = None,
    least: float | None = None,
) -> Any:
    """A field with what the command line needs: its help, other names, its choices, what the flag without a value means, the
    smallest value allowed."""
    return field(
        default=default, metadata={"help": help, "also": also, "choices": choices, "bare": bare, "least": least}
    )


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of `mlx-fish train`, with its default."""

    model: str | None = setting(
        None,
        "Model: a Hub id, a folder, or `tiny`. [default: the last converted, else Qwen/Qwen2-0.5B]",
        also=("model_name_or_path",),
    )
    data: str = setting(
        "fish_care",
        "A .jsonl/.json file, a folder of train/valid/test files, or a name in dataset_info.json; with --stage pt also .txt.",
        also=("dataset",),
    )
    stage: str = setting(
        "sft", "sft: questions and answers, of which the answers are learnt. pt: raw text, all of it.", choices=STAGES
    )
    output_dir: str = setting("finetuned_model", "Where the adapter, logs and checkpoints go.")
    iters: int | None = setting(None, "Optimizer updates; overrides --epochs.", also=("max_steps",), least=1)
    epochs: float = setting(2.0, "Passes over the training rows.", also=("num_train_epochs",), least=0.0)
    batch_size: int = setting(4, "Rows a micro-batch.", also=("per_device_train_batch_size",), least=1)
    grad_accumulation: int = setting(1, "Micro-batches an update.", also=("gradient_accumulation_steps",), least=1)
    learning_rate: float = setting(5e-4, "Peak learning rate.", least=0.0)
    warmup: int = setting(0, "Updates over which the learning rate rises to its peak.", also=("warmup_steps",), least=0)
    schedule: str = setting(
        "cosine", "How the learning rate falls after the warm-up.", also=("lr_scheduler_type",), choices=SCHEDULES
    )
    lora_rank: int = setting(8, "Rank r of the adapter.", least=1)
    lora_alpha: float = setting(16.0, "The adapter is scaled by alpha / r.", least=0.0)
    use_rslora: bool = setting(False, "Scale the adapter by alpha / sqrt(r) instead (rsLoRA).")
    lora_dropout: float = setting(0.0, "Share of LoRA's input zeroed in training.", least=0.0)
    lora_target: str = setting("all", "Linear layers to adapt: `all`, or names such as q_proj,v_proj.")
    num_layers: int | None = setting(None, "Adapt only the last N blocks. [default: all]", least=1)
    max_seq_length: int = setting(
        2048, "Longest row in tokens; a longer one is cut, and reported.", also=("cutoff_len",), least=2
    )
    packing: bool = setting(True, "Lay the rows of a batch end to end, without padding; each attends to itself alone.")
    grad_checkpoint: str = setting(
        "auto",
        "Keep no activations, compute them again in the backward pass: slower, in far less memory; auto: when memory needs it.",
        also=("gradient_checkpointing",),
        choices=SWITCH,
        bare="on",
    )
    template: str = setting(
        "auto", "Prompt format: auto, chat (the tokenizer's own), alpaca, qwen, chatml, default, empty."
    )
    eval_every: int | None = setting(
        None, "Validate every N updates. [default: before the first and after the last]", also=("eval_steps",), least=1
    )
    eval_rows: int | None = setting(
        None, "Validation rows used, always the same. [default: all, fewer in a short run]", least=1
    )
    save_every: int = setting(100, "Write a checkpoint every N updates, and at the end.", also=("save_steps",), least=1)
    keep: int = setting(2, "Checkpoints kept, the newest ones.", also=("save_total_limit",), least=2)
    logging_steps: int = setting(1, "Report every N updates.", least=1)
    seed: int = setting(42, "Decides the adapter's start, the order of rows and the dropout.", least=0)
    backend: str = setting(
        "auto", "Compute with mlx or torch; auto: $MLX_FISH_BACKEND, else what suits the machine.", choices=BACKENDS
    )
    skip_bad_rows: bool = setting(False, "Train on the good rows of a data set with broken ones, and count those.")
    overwrite: bool = setting(False, "Replace the run in --output-dir.", also=("overwrite_output_dir",))

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            self._check(item, getattr(self, item.name))
        if self.epochs == 0 and self.iters is None:
            raise FishError("--epochs 0 trains nothing; give a positive number, or --iters.")
        if self.stage == "pt" and self.template not in ("auto", "empty"):
            raise FishError(f"--template {self.template}: raw text (--stage pt) has no template; leave it out.")
        if not self.lora_dropout < 1:
            raise FishError(f"--lora-dropout {self.lora_dropout}: expected 0 up to below 1.")
        if self.lora_alpha == 0:
            raise FishError(
                "--lora-alpha 0 switches the adapter off; give a positive number (twice the rank is usual)."
            )

    def _check(self, item: "dataclasses.Field[Any]", value: Any) -> None:
        flag = flag_name(item.name)
        if value is None:
            if not _may_be_none(item):
                raise FishError(f"{flag} is empty; give a value or leave it out.")
            return
        kind = kind_of(item)
        right_type = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not right_type:
            raise FishError(f"{flag} {value!r}: expected {_KIND_NAMES[kind]}.")
        choices, least = item.metadata["choices"], item.metadata["least"]
        if choices and value not in choices:
            raise FishError(f"{flag} {value}: expected one of {', '.join(choices)}.{did_you_mean(value, choices)}")
        if least is not None and not least <= value < float("inf"):
            raise FishError(f"{flag} {value}: expected at least {least:g}.")


_KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def kind_of(item: "dataclasses.Field[Any]") -> type:
    """The plain type of a setting: `int | None` -> int."""
    kinds = [kind for kind in _kinds(item.name) if kind is not type(None)]
    return kinds[0]


def _may_be_none(item: "dataclasses.Field[Any]") -> bool:
    return type(None) in _kinds(item.name)


def _kinds(name: str) -> tuple[type, ...]:
    hint = typing.get_type_hints(TrainConfig)[name]
    return typing.get_args(hint) or (hint,)


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def names() -> dict[str, str]:
    """Every accepted key -> the field it sets."""
    found = {}
    for item in dataclasses.fields(TrainConfig):
        found[item.name] = item.name
        found.update(dict.fromkeys(item.metadata["also"], item.name))
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings from a YAML file, by field name.

    Raises:
        FishError: unreadable, not a mapping, or a key that is no setting (the nearest is suggested).
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FishError(f"cannot read {path}: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise FishError(f"{path} is not valid YAML ({' '.join(str(error).split())}).") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise FishError(f"{path} should hold `setting: value` lines.")
    known = names()
    settings = {}
    for key, value in values.items():
        field_name = known.get(str(key).replace("-", "_"))
        if field_name is None:
            raise FishError(f"{path}: unknown setting `{key}`.{did_you_mean(str(key), known)}")
        if field_name in settings:
            raise FishError(f"{path}: `{key}` sets {field_name} a second time.")
        settings[field_name] = _from_yaml(field_name, value)
    return settings


def _from_yaml(name: str, value: Any) -> Any:
    """YAML reads 1e-4 as text, 3 as an integer where a number is wanted, and `on` as true."""
    item = next(item for item in dataclasses.fields(TrainConfig) if item.name == name)
    kind = kind_of(item)
    if item.metadata["choices"] == SWITCH and isinstance(value, bool):
        return "on" if value else "off"
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            return value
    return value
