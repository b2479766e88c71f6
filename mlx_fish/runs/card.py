"""The README.md of an adapter folder and of a fused model: Markdown with YAML front matter, as the Hub reads it.

Format: https://huggingface.co/docs/hub/model-cards. Text in, text out; nothing of this machine gets into it, so that
a folder can be published as it is: of a path only the last part is told.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from mlx_fish.models.hub import is_hub_id

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_QUESTION = "Hello! What can you help me with?"  # where the run does not say what it asked
_LONGEST_QUESTION = 200
_SETTINGS = (
    ("lora_rank", "LoRA rank"),
    ("lora_alpha", "LoRA alpha"),
    ("use_rslora", "scaled by alpha / sqrt(rank) (rsLoRA)"),
    ("lora_dropout", "LoRA dropout"),
    ("lora_target", "adapted layers"),
    ("num_layers", "last blocks only"),
    ("iters", "updates"),
    ("epochs", "epochs"),
    ("batch_size", "batch size"),
    ("grad_accumulation", "gradient accumulation"),
    ("learning_rate", "learning rate"),
    ("schedule", "schedule"),
    ("warmup", "warm-up updates"),
    ("max_seq_length", "longest row in tokens"),
    ("seed", "seed"),
)
_LIMITS = """\
## Limits

This is a small model, and its answers can be wrong, however sure they sound. The model knows nothing that happened after its
base model was trained, except what stood in the training rows.{en}

## 中文说明

这是用 mlx-fish 在自己的数据上微调的小模型，回答可能有误，请自行核实。{zh}
"""


@dataclass(frozen=True)
class Tuning:
    """What a card tells of a training run. Only the base is always known.

    Attributes:
        base: a Hub id, or a path of which the last part is told.
        license: the base's licence, as the Hub names it (`apache-2.0`).
        data: the data set's name or path; `rows` are those trained on.
        question: what to try it with.
        warning: what the data set says of a model tuned on it, by language.
        loss_before, loss_after: mean loss a supervised token (nats) on the validation rows.
    """

    base: str
    revision: str | None = None
    license: str | None = None
    data: str | None = None
    rows: int | None = None
    template: str | None = None
    question: str = _QUESTION
    warning: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    loss_before: float | None = None
    loss_after: float | None = None

    @classmethod
    def from_run(cls, run: Mapping[str, Any], *, base: str, license: str | None = None) -> "Tuning":
        """From run.json: `base.revision`, `data.name`, `data.rows`, `template.name`, `settings`, `results.loss_before`,
        `results.loss_after`; what is missing or of another kind stays unknown."""

        def find(section: str, key: str, *kinds: type) -> Any:
            part = run.get(section)
            value = part.get(key) if isinstance(part, Mapping) else None
            return value if isinstance(value, kinds) and not isinstance(value, bool) else None

        settings, warning = run.get("settings"), find("data", "warning", dict) or {}
        return cls(
            base=base,
            revision=find("base", "revision", str),
            license=license,
            data=find("data", "name", str),
            rows=find("data", "rows", int),
            template=find("template", "name", str),
            question=_one_line(find("sample", "question", str) or "")[:_LONGEST_QUESTION] or _QUESTION,
            warning={language: _one_line(text) for language, text in warning.items() if isinstance(text, str)},
            settings=settings if isinstance(settings, Mapping) else {},
            loss_before=find("results", "loss_before", int, float),
            loss_after=find("results", "loss_after", int, float),
        )


def adapter_card(tuning: Tuning) -> str:
    """README.md for the adapter folder that training writes."""
    base = public_name(tuning.base)
    place = base if is_hub_id(tuning.base) else f"path/to/{base}"
    usage = f"""\
With PEFT, in this folder:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{place}")
model = PeftModel.from_pretrained(base, ".")
{_ask(tuning.question)}```

With mlx-fish:

```bash
mlx-fish generate --adapter . -p {shlex.quote(tuning.question)}
mlx-fish fuse --adapter . --to-hf
```
"""
    return _card(
        _front_matter(tuning, library="peft", relation="adapter", tags=["lora", "mlx-fish"]),
        f"# A LoRA adapter for {base}",
        f"A low-rank adapter ([LoRA](https://arxiv.org/abs/2106.09685), in PEFT's format) for {_link(tuning)}, trained "
        "with mlx-fish. It needs that base model.",
        tuning,
        usage,
    )


def fused_card(tuning: Tuning, *, dtype: str) -> str:
    """README.md for a fused model, whose weights are stored in `dtype`."""
    usage = f"""\
With transformers, in this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
{_ask(tuning.question)}```

With mlx-fish:

```bash
mlx-fish generate --model . --no-adapter -p {shlex.quote(tuning.question)}
```
"""
    return _card(
        _front_matter(tuning, library="transformers", relation="finetune", tags=["mlx-fish"]),
        f"# {public_name(tuning.base)}, fine-tuned",
        f"{_link(tuning)}, fine-tuned with mlx-fish: a LoRA adapter was merged into its weights in float32, and "
        f"the result is stored in {dtype}.",
        tuning,
        usage,
    )


def public_name(name: str) -> str:
    """A model's or data set's name as others may see it: a Hub id as it is, of a path the last part."""
    return name if is_hub_id(name) else PurePath(name.rstrip("/")).name or name


def license_of(folder: Path) -> str | None:
    """The licence in the front matter of a model folder's own README.md; None when it names none."""
    import yaml

    path = folder / "README.md"
    if not path.is_file():
        return None
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, RecursionError):
        return None
    found = front.get("license") if isinstance(front, dict) else None
    # `other` and `unknown` say nothing without the base's further keys.
    usable = isinstance(found, str) and _LICENSE.fullmatch(found) and found not in ("other", "unknown")
    return found if usable else None


def _card(front: str, title: str, summary: str, tuning: Tuning, usage: str) -> str:
    training = _training(tuning)
    parts = [
        front + title,
        summary,
        *([training] if training else []),
        "## How to use it",
        usage.rstrip(),
        _limits(tuning),
    ]
    return "\n\n".join(parts)


def _front_matter(tuning: Tuning, *, library: str, relation: str, tags: list[str]) -> str:
    import yaml

    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    if is_hub_id(tuning.base):  # the Hub refuses a card whose base_model is not one
        front = {"base_model": tuning.base, "base_model_relation": relation, **front}
    if tuning.license:
        front["license"] = tuning.license
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n"


def _link(tuning: Tuning) -> str:
    name = public_name(tuning.base)
    if not is_hub_id(tuning.base):
        return f"`{name}`"
    at = f" (revision `{tuning.revision}`)" if tuning.revision else ""
    return f"[{name}](https://huggingface.co/{name}){at}"


def _training(tuning: Tuning) -> str:
    lines = []
    if tuning.data:
        rows = f", {tuning.rows} rows" if tuning.rows else ""
        lines.append(f"- data: `{_plain(public_name(tuning.data))}`{rows}")
    if tuning.template:
        lines.append(f"- prompt template: `{tuning.template}` (written out in `chat_template.jinja`)")
    settings = dict(tuning.settings)
    if settings.get("iters") is not None:
        settings.pop("epochs", None)  # --iters overrides them
    lines += [
        f"- {label}: {settings[key]}"
        for key, label in _SETTINGS
        if settings.get(key) not in (None, "") and settings[key] is not False
    ]
    if tuning.loss_before is not None and tuning.loss_after is not None:
        lines.append(f"- validation loss: {tuning.loss_before:.4f} before, {tuning.loss_after:.4f} after")
    return "## Training\n\n" + "\n".join(lines) if lines else ""


def _limits(tuning: Tuning) -> str:
    """What to keep in mind, with what the data set itself says."""
    warnings = {language: tuning.warning.get(language, "") for language in ("en", "zh")}
    return _LIMITS.format(
        en="\n\n" + warnings["en"] if warnings["en"] else "", zh="\n\n" + warnings["zh"] if warnings["zh"] else ""
    )


def _one_line(text: str) -> str:
    """A text from a file, as plain text on one line: no control characters, and nothing that Markdown or HTML would read."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(re.sub(r"[`<>\[\]*_|#\\]", " ", printable).split())


def _plain(text: str) -> str:
    """Fit for a code span on one line."""
    return " ".join(text.replace("`", "'").split())


def _ask(question: str) -> str:
    return f"""\
tokenizer = AutoTokenizer.from_pretrained(".")
messages = [{{"role": "user", "content": {json.dumps(question, ensure_ascii=False)}}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""
