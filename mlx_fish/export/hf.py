"""A merged model -> a complete Hugging Face folder that transformers, mlx-lm, vLLM and Ollama read.

The format: https://huggingface.co/docs/transformers. Knows nothing about LoRA, nor where the folder will finally lie.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_fish.export import MergedModel
from mlx_fish.files import write_json, write_text
from mlx_fish.model_folder import RECORD, copy_tokenizer
from mlx_fish.tensors import SHARD_BYTES, write_shards

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


def write(
    folder: Path,
    model: MergedModel,
    *,
    dtype: str,
    card: str,
    record: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> int:
    """Write weights, configs, tokenizer, template and model card into an empty folder.

    Args:
        dtype: float32, float16 or bfloat16, the stored type of every tensor.
        card: README.md.
        record: mlx_fish.json, what the folder came from.
        progress: called with the bytes written after each tensor.

    Returns:
        the bytes of all tensors together.

    Raises:
        FishError: no tokenizer, or a value too large for float16.
    """
    copy_tokenizer(model.tokenizer_folder, folder, chat_template=model.chat_template)
    write_json(folder / "config.json", stored_config(model.config, dtype))
    write_json(folder / "generation_config.json", dict(model.generation_config))
    write_text(folder / "README.md", card)
    write_json(folder / RECORD, dict(record))
    return write_shards(folder, model.shapes, model.read, dtype=dtype, shard_bytes=shard_bytes, progress=progress)


def stored_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for plain weights in `dtype` (named in the new form and the old): no quantisation, no code to run."""
    dropped = ("quantization", "quantization_config", "auto_map", "_name_or_path")
    stored = {key: value for key, value in config.items() if key not in dropped}
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if "architectures" not in stored and architecture:
        stored["architectures"] = [architecture]
    return {**stored, "dtype": dtype, "torch_dtype": dtype}
