"""Write the model card (README.md) of an adapter and of a fused model: Markdown with YAML front matter for the Hub.

Format: https://huggingface.co/docs/hub/model-cards. Pure functions from strings to strings. A card contains nothing
about the local machine, so the folder can be published unchanged: of a path, only the last component is shown.
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
_QUESTION = "Hello! What can you help me with?"  # if the run has no sample question
_MAX_QUESTION_CHARS = 200
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

This is a small model. Its answers can be wrong, however confident they sound. It knows nothing that happened after its base model
was trained, except what the training rows contain.{en}

## 中文说明

这是用 mlx-fish 在自己的数据上微调的小模型，回答可能有误，请自行核实。{zh}
"""


@dataclass(frozen=True)
class Tuning:
    """The facts about a training run that a card shows. Only the base is required.

    Attributes:
        base: Hub id or path of the base model; of a path, only the last component is shown.
        revision: commit of the base on the Hub.
        license: the base's licence as a Hub identifier, such as `apache-2.0`.
        data: name or path of the data set.
        rows: number of training rows.
        template: name of the prompt template.
        question: sample question for the usage examples.
        warning: language code -> the data set's warning about models trained on it.
        settings: the settings in run.json.
        loss_before, loss_after: mean validation loss before and after training, nats per supervised token.
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
        """Read the facts from the content of a run.json; entries that are missing or have the wrong type are left out.

        Args:
            run: content of run.json.
            base, license: see the attributes; they are not read from `run`.
        """

        def find(section: str, key: str, *kinds: type) -> Any:
            entries = run.get(section)
            value = entries.get(key) if isinstance(entries, Mapping) else None
            return value if isinstance(value, kinds) and not isinstance(value, bool) else None

        settings, warning = run.get("settings"), find("data", "warning", dict) or {}
        return cls(
            base=base,
            revision=find("base", "revision", str),
            license=license,
            data=find("data", "name", str),
            rows=find("data", "rows", int),
            template=find("template", "name", str),
            question=_one_line(find("sample", "question", str) or "")[:_MAX_QUESTION_CHARS] or _QUESTION,
            warning={language: _one_line(text) for language, text in warning.items() if isinstance(text, str)},
            settings=settings if isinstance(settings, Mapping) else {},
            loss_before=find("results", "loss_before", int, float),
            loss_after=find("results", "loss_after", int, float),
        )


def adapter_card(tuning: Tuning) -> str:
    """Return the README.md of an adapter folder."""
    base = public_name(tuning.base)
    base_path = base if is_hub_id(tuning.base) else f"path/to/{base}"
    usage = f"""\
With PEFT, in this folder:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base_path}")
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
    """Return the README.md of a fused model whose weights are stored in `dtype`."""
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
    """Return a name that is safe to publish: a Hub id unchanged, or the last component of a path."""
    return name if is_hub_id(name) else PurePath(name.rstrip("/")).name or name


def license_of(folder: Path) -> str | None:
    """Return the licence in the front matter of a model folder's README.md, or None if there is none."""
    import yaml

    path = folder / "README.md"
    if not path.is_file():
        return None
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, RecursionError):
        return None
    name = front.get("license") if isinstance(front, dict) else None
    # `other` and `unknown` are meaningless without further keys of the base's card.
    is_usable = isinstance(name, str) and _LICENSE.fullmatch(name) and name not in ("other", "unknown")
    return name if is_usable else None


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
    if is_hub_id(tuning.base):  # the Hub rejects a base_model that is not a Hub id
        front = {"base_model": tuning.base, "base_model_relation": relation, **front}
    if tuning.license:
        front["license"] = tuning.license
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n"


def _link(tuning: Tuning) -> str:
    """Return a Markdown link to the base on the Hub, or its name if it is local."""
    name = public_name(tuning.base)
    if not is_hub_id(tuning.base):
        return f"`{name}`"
    revision = f" (revision `{tuning.revision}`)" if tuning.revision else ""
    return f"[{name}](https://huggingface.co/{name}){revision}"


def _training(tuning: Tuning) -> str:
    """Return the section on training, or an empty string if nothing is known."""
    lines = []
    if tuning.data:
        rows = f", {tuning.rows} rows" if tuning.rows else ""
        lines.append(f"- data: `{_plain(public_name(tuning.data))}`{rows}")
    if tuning.template:
        lines.append(f"- prompt template: `{tuning.template}` (written out in `chat_template.jinja`)")
    settings = dict(tuning.settings)
    if settings.get("iters") is not None:
        settings.pop("epochs", None)  # --iters overrides --epochs
    lines += [
        f"- {label}: {settings[key]}"
        for key, label in _SETTINGS
        if settings.get(key) not in (None, "") and settings[key] is not False
    ]
    if tuning.loss_before is not None and tuning.loss_after is not None:
        lines.append(f"- validation loss: {tuning.loss_before:.4f} before, {tuning.loss_after:.4f} after")
    return "## Training\n\n" + "\n".join(lines) if lines else ""


def _limits(tuning: Tuning) -> str:
    """Return the section on limitations, with the data set's own warning."""
    warnings = {language: tuning.warning.get(language, "") for language in ("en", "zh")}
    return _LIMITS.format(
        en="\n\n" + warnings["en"] if warnings["en"] else "", zh="\n\n" + warnings["zh"] if warnings["zh"] else ""
    )


def _one_line(text: str) -> str:
    """Return untrusted text on one line, without control characters and without Markdown or HTML syntax."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(re.sub(r"[`<>\[\]*_|#\\]", " ", printable).split())


def _plain(text: str) -> str:
    """Return text on one line that is safe inside a Markdown code span."""
    return " ".join(text.replace("`", "'").split())


def _ask(question: str) -> str:
    """Return the Python lines that ask `model` a question."""
    return f"""\
tokenizer = AutoTokenizer.from_pretrained(".")
messages = [{{"role": "user", "content": {json.dumps(question, ensure_ascii=False)}}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""
