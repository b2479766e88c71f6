"""Load the tokenizer of a model folder with transformers. Never runs the model's own code."""

from typing import Any

from mlx_fish.errors import FishError
from mlx_fish.models.folder import ModelFolder


def load_tokenizer(folder: ModelFolder) -> Any:
    """Load the transformers tokenizer of a model folder, without network access or running the model's code.

    Raises:
        FishError: the folder has no tokenizer.json, or transformers cannot load it.
    """
    if not (folder.path / "tokenizer.json").is_file():
        raise FishError(f"{folder.path} has no tokenizer.json; download the model's tokenizer files.")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder.path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # an invalid tokenizer.json can make the library raise anything
        raise FishError(f"the tokenizer in {folder.path} cannot be loaded ({error}).") from error
