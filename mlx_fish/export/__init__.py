"""What a merged model is to the writers of this folder: one target a file, knowing one format and nothing of LoRA."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fish.tensors import Float32


@dataclass(frozen=True)
class MergedModel:
    """A whole model as a stream of tensors, and what has to lie beside them.

    Attributes:
        shapes: Hugging Face tensor name -> shape, in the order to read them; no second copy of a tied head.
        read: name -> float32 array of that shape; a writer asks once for each, and holds one at a time.
        config: config.json with both rope forms.
        generation_config: generation_config.json, with every id at which the model stops.
        tokenizer_folder: where the tokenizer's files lie.
        chat_template: the template that the model was tuned with; None: the one in `tokenizer_folder`.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Float32]
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer_folder: Path
    chat_template: str | None = None
