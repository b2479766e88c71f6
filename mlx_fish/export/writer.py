"""Define the interface between merging and export: the merged model, and the protocol of its writers.

Each writer handles one format and is independent of LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlx_fish.storage.files import read_json
from mlx_fish.storage.tensors import Float32


@dataclass(frozen=True)
class MergedModel:
    """Everything about a merged model except its weights.

    Attributes:
        shapes: Hugging Face tensor name -> shape, in the order in which writers receive the tensors; without
            a tied head.
        config: config.json, with both forms of the RoPE settings.
        generation_config: generation_config.json, with every token id at which the model stops.
        tokenizer_folder: folder of the tokenizer's files.
        chat_template: the chat template that the model was tuned with; None: the one in `tokenizer_folder`.
        name: display name of the model.
        base_name: Hub id of the base, or the last part of its folder's path.
        license: the base's license, as a Hub identifier.
        system: the system prompt at the start of every training row.
        trained_length: the maximum sequence length of training, in tokens.
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
        """Return the chat template, from `chat_template` or the tokenizer's files; None if there is none."""
        if self.chat_template is not None:
            return self.chat_template
        path = self.tokenizer_folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        settings = self.tokenizer_folder / "tokenizer_config.json"
        stored = read_json(settings).get("chat_template") if settings.is_file() else None
        return stored if isinstance(stored, str) else None


class Writer(Protocol):
    """A receiver of one model's tensors, one at a time, in the order of `MergedModel.shapes`.

    Attributes:
        dtype: the stored type, as shown to people.
        num_bytes: total size of the stored tensors, bytes.
    """

    dtype: str
    num_bytes: int

    def put(self, name: str, array: Float32) -> int:
        """Write the next tensor, float32, and return its stored size in bytes."""
        ...

    def as_read(self, name: str, array: Float32) -> Float32:
        """Return `array`, some complete rows of the tensor, as a reader sees it: float32, same shape."""
        ...

    def close(self) -> None:
        """Complete the files after the last tensor."""
        ...
