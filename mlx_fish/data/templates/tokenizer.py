"""Load the tokenizer of a model folder. Never runs the model's own code."""

from typing import Any

from mlx_fish.errors import FishError
from mlx_fish.models.folder import ModelFolder


def load_tokenizer(folder: ModelFolder) -> Any:
    """The tokenizer of a model folder, as transformers reads it. Never runs the model's own code."""
    if not (folder.path / "tokenizer.json").is_file():
        raise FishError(f"{folder.path} has no tokenizer.json; fetch the tokenizer files of the model.")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder.path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a foreign tokenizer.json makes the library raise
        raise FishError(f"the tokenizer in {folder.path} cannot be loaded ({error}).") from error
