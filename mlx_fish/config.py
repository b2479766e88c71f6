"""Define the settings of a training run: the single source of flags, YAML keys, defaults and help texts.

Independent of how the settings are used. LLaMA-Factory's names are accepted as aliases.
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
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    flag_value: str | None = None,
    minimum: float | None = None,
) -> Any:
    """Return a dataclass field with the metadata that the command line and the checks need.

    Args:
        help: help text of the flag.
        aliases: other accepted names of the setting.
        choices: allowed values; empty: any value of the field's type.
        flag_value: value of the flag if it is given without one; None: the flag requires a value.
        minimum: smallest allowed value.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "aliases": aliases,
            "choices": choices,
            "flag_value": flag_value,
            "minimum": minimum,
        },
    )


@dataclass(frozen=True)
class TrainConfig:
    """The settings of `mlx-fish train` and their defaults.

    Raises:
        FishError: a value has the wrong type or is out of range.
    """

    model: str | None = setting(
        None,
        "Base model: a Hub id, a model folder, or `tiny` (built in).  "
        "[default: the last converted model, else Qwen/Qwen2-0.5B]",
        aliases=("model_name_or_path",),
    )
    data: str = setting(
        "fish_care",
        "Training data: a .jsonl or .json file (with --stage pt also .txt), a folder with train/valid/test files, or a "
        "name in dataset_info.json.",
        aliases=("dataset",),
    )
    stage: str = setting(
        "sft",
        "Training objective. sft: questions and answers, with the loss on the answers only. pt: raw text, with the loss "
        "on every token.",
        choices=STAGES,
    )
    output_dir: str = setting("finetuned_model", "Folder for the adapter, the logs and the checkpoints.")
    iters: int | None = setting(
        None,
        "Number of optimizer updates. Overrides --epochs.  [default: set by --epochs]",
        aliases=("max_steps",),
        minimum=1,
    )
    epochs: float = setting(2.0, "Number of passes over the training rows.", aliases=("num_train_epochs",), minimum=0.0)
    batch_size: int = setting(4, "Rows per micro-batch.", aliases=("per_device_train_batch_size",), minimum=1)
    grad_accumulation: int = setting(
        1,
        "Micro-batches per optimizer update.",
        aliases=("gradient_accumulation_steps",),
        minimum=1,
    )
    learning_rate: float = setting(5e-4, "Peak learning rate.", minimum=0.0)
    warmup: int = setting(0, "Number of updates of linear warm-up.", aliases=("warmup_steps",), minimum=0)
    schedule: str = setting(
        "cosine", "Learning-rate schedule after the warm-up.", aliases=("lr_scheduler_type",), choices=SCHEDULES
    )
    lora_rank: int = setting(8, "Rank r of the adapter.", minimum=1)
    lora_alpha: float = setting(
        16.0, "Scaling parameter: the adapter's output is multiplied by alpha / r.", minimum=0.0
    )
    use_rslora: bool = setting(False, "Use rank-stabilised LoRA: scale by alpha / sqrt(r) instead of alpha / r.")
    lora_dropout: float = setting(0.0, "Dropout probability on the adapter's input.", minimum=0.0)
    lora_target: str = setting("all", "Linear layers to adapt: `all`, or a comma-separated list such as q_proj,v_proj.")
    num_layers: int | None = setting(
        None, "Adapt only the last N transformer blocks.  [default: all blocks]", minimum=1
    )
    max_seq_length: int = setting(
        2048,
        "Maximum length of a row in tokens. Longer rows are truncated, with a warning.",
        aliases=("cutoff_len",),
        minimum=2,
    )
    packing: bool = setting(
        True,
        "Concatenate the rows of a micro-batch instead of padding them; attention stays within each row.  "
        "[default: --packing]",
    )
    grad_checkpoint: str = setting(
        "auto",
        "Recompute activations in the backward pass instead of storing them: slower, but needs far less memory. "
        "auto: only if the run does not fit otherwise. Without a value: on.",
        aliases=("gradient_checkpointing",),
        choices=SWITCH,
        flag_value="on",
    )
    template: str = setting(
        "auto",
        "Prompt template: chat (the tokenizer's own chat template), alpaca, qwen, chatml, default or empty. auto: chat if "
        "the model ends its answers with that template's end token, else alpaca.",
    )
    eval_every: int | None = setting(
        None,
        "Validate every N updates, and before and after training.  [default: only before and after training]",
        aliases=("eval_steps",),
        minimum=1,
    )
    eval_rows: int | None = setting(
        None, "Number of validation rows to use, the same each time.  [default: all; fewer in a short run]", minimum=1
    )
    save_every: int = setting(
        100, "Save a checkpoint every N updates, and at the end.", aliases=("save_steps",), minimum=1
    )
    keep: int = setting(
        2, "Number of checkpoints to keep; older ones are deleted.", aliases=("save_total_limit",), minimum=2
    )
    logging_steps: int = setting(1, "Log the mean training loss to trainer_log.jsonl every N updates.", minimum=1)
    seed: int = setting(42, "Random seed for the adapter's initialisation, the order of rows and dropout.", minimum=0)
    backend: str = setting(
        "auto",
        "Framework to compute with. auto: $MLX_FISH_BACKEND if set, else MLX on Apple silicon and torch elsewhere, "
        "or whichever is installed.",
        choices=BACKENDS,
    )
    skip_bad_rows: bool = setting(False, "Skip broken rows and report their number, instead of stopping with an error.")
    overwrite: bool = setting(False, "Replace an existing run in --output-dir.", aliases=("overwrite_output_dir",))

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            self._check(item, getattr(self, item.name))
        if self.epochs == 0 and self.iters is None:
            raise FishError("--epochs 0 trains nothing; set a positive number, or set --iters.")
        if self.stage == "pt" and self.template not in ("auto", "empty"):
            raise FishError(f"--template {self.template}: raw text (--stage pt) has no template; omit the flag.")
        if not self.lora_dropout < 1:
            raise FishError(f"--lora-dropout {self.lora_dropout}: expected at least 0 and less than 1.")
        if self.lora_alpha == 0:
            raise FishError("--lora-alpha 0 disables the adapter; set a positive number (twice the rank is common).")

    def _check(self, item: "dataclasses.Field[Any]", value: Any) -> None:
        """Check the type and the range of one setting."""
        flag = flag_name(item.name)
        if value is None:
            if not _may_be_none(item):
                raise FishError(f"{flag} is empty; set a value or omit it.")
            return
        kind = kind_of(item)
        has_right_type = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not has_right_type:
            raise FishError(f"{flag} {value!r}: expected {_KIND_NAMES[kind]}.")
        choices, minimum = item.metadata["choices"], item.metadata["minimum"]
        if choices and value not in choices:
            raise FishError(f"{flag} {value}: expected one of {', '.join(choices)}.{did_you_mean(value, choices)}")
        if minimum is not None and not minimum <= value < float("inf"):
            raise FishError(f"{flag} {value}: expected at least {minimum:g}.")


_KIND_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def kind_of(item: "dataclasses.Field[Any]") -> type:
    """Return the type of a setting without None: `int | None` -> int."""
    kinds = [kind for kind in _kinds(item.name) if kind is not type(None)]
    return kinds[0]


def _may_be_none(item: "dataclasses.Field[Any]") -> bool:
    return type(None) in _kinds(item.name)


def _kinds(name: str) -> tuple[type, ...]:
    """Return the member types of a setting's annotation."""
    hint = typing.get_type_hints(TrainConfig)[name]
    return typing.get_args(hint) or (hint,)


def flag_name(name: str) -> str:
    """Return the flag of a setting: `lora_rank` -> `--lora-rank`."""
    return "--" + name.replace("_", "-")


def accepted_names() -> dict[str, str]:
    """Return a mapping from every accepted name, aliases included, to the name of its field."""
    field_names = {}
    for item in dataclasses.fields(TrainConfig):
        field_names[item.name] = item.name
        field_names.update(dict.fromkeys(item.metadata["aliases"], item.name))
    return field_names


def read_yaml(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file.

    Returns:
        the values by field name.

    Raises:
        FishError: the file cannot be read, is not a mapping, or has an unknown key (a similar one is suggested).
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
        raise FishError(f"{path}: expected a mapping, one `setting: value` per line.")
    known = accepted_names()
    settings = {}
    for key, value in values.items():
        field_name = known.get(str(key).replace("-", "_"))
        if field_name is None:
            raise FishError(f"{path}: unknown setting `{key}`.{did_you_mean(str(key), known)}")
        if field_name in settings:
            raise FishError(f"{path}: `{key}` sets {field_name} a second time; remove one of the two lines.")
        settings[field_name] = _from_yaml(field_name, value)
    return settings


def _from_yaml(name: str, value: Any) -> Any:
    """Convert a YAML value to the type of its setting: YAML reads 1e-4 as text, 3 as an integer and `on` as true."""
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
