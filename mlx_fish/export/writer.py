"""What a merged model is to the writers of this folder: one target a file, knowing one format and nothing of LoRA."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlx_fish.storage.files import read_json
from mlx_fish.storage.tensors import Float32


@dataclass(frozen=True)
class MergedModel:
    """All that is known of a model before its first tensor comes.

    Attributes:
        shapes: Hugging Face tensor name -> shape, in the order in which the tensors will come; no second copy of a tied head.
        config: config.json with both rope forms.
        generation_config: generation_config.json, with every id at which the model stops.
        tokenizer_folder: where the tokenizer's files lie.
        chat_template: the template that the model was tuned with; None: the one in `tokenizer_folder`.
        name: what people may call it.
        base_name: a Hub id or a folder's last part.
        license: the base's, as the Hub names it.
        system: the system prompt that every training row began with.
        trained_length: the longest row in tokens that training took.
    """

    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer_folder: Path
    chat_template: str | None = None
    name: str = "model"
    base_name: str | None = None
    license: str | None = None
    system: str | None = None
    trained_length: int | None = None

    def own_template(self) -> str | None:
        """The chat template, wherever it stands."""
        if self.chat_template is not None:
            return self.chat_template
        path = self.tokenizer_folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        settings = self.tokenizer_folder / "tokenizer_config.json"
        stored = read_json(settings).get("chat_template") if settings.is_file() else None
        return stored if isinstance(stored, str) else None


class Writer(Protocol):
    """Takes the tensors of one model, one after another, in the order of `MergedModel.shapes`."""

    dtype: str
    num_bytes: int

    def put(self, name: str, array: Float32) -> int:
        """Write the next tensor; returns the bytes that it takes."""
        ...

    def as_read(self, name: str, array: Float32) -> Float32:
        """What a reader finds in place of `array`, which is some whole rows of the tensor."""
        ...

    def close(self) -> None:
        """Every tensor has come: complete the files."""
        ...
