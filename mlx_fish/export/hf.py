"""Write a merged model as a complete Hugging Face folder, readable by transformers, mlx-lm, vLLM and Ollama.

The format: https://huggingface.co/docs/transformers. Independent of LoRA and of the folder's final path.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fish.export.writer import MergedModel
from mlx_fish.models.families import FAMILIES
from mlx_fish.models.folder import RECORD, copy_tokenizer
from mlx_fish.storage.files import write_json, write_text
from mlx_fish.storage.tensors import DTYPES, SHARD_BYTES, Float32, ShardWriter, Slot, decode, encode, encoded_pieces


class HfWriter:
    """Writer of a Hugging Face folder: weights, configs, tokenizer, chat template and model card.

    Implements `mlx_fish.export.writer.Writer`.
    """

    def __init__(
        self,
        folder: Path,
        model: MergedModel,
        *,
        dtype: str,
        card: str,
        record: Mapping[str, Any],
        shard_bytes: int = SHARD_BYTES,
    ):
        """Write everything but the weights.

        Args:
            folder: an empty folder.
            dtype: stored dtype of every tensor: float32, float16 or bfloat16.
            card: content of README.md.
            record: content of mlx_fish.json, the folder's origin.
            shard_bytes: maximum size of one safetensors file, bytes.

        Raises:
            FishError: the model has no tokenizer.
        """
        self.dtype = dtype
        slots = [Slot(name, DTYPES[dtype][0], shape) for name, shape in model.shapes.items()]
        self._shards = ShardWriter(folder, slots, shard_bytes=shard_bytes)
        self.num_bytes = self._shards.num_bytes
        write_companion_files(folder, model, stored_config(model.config, dtype), card=card, record=record)

    def put(self, name: str, array: Float32) -> int:
        """Write the next tensor and return its size in bytes.

        Raises:
            FishError: a value is too large for float16.
        """
        slot = self._shards.put(encoded_pieces(array, self.dtype, name))
        assert (slot.name, slot.shape) == (name, array.shape), (slot, name, array.shape)
        return slot.num_bytes

    def as_read(self, name: str, array: Float32) -> Float32:
        """Return `array` as a reader sees it: rounded to the stored dtype, in float32."""
        if self.dtype == "float32":
            return array
        return decode(encode(array, self.dtype, name), DTYPES[self.dtype][0]).reshape(array.shape)

    def close(self) -> None:
        """Complete the files."""
        self._shards.close()


def write_companion_files(
    folder: Path, model: MergedModel, config: Mapping[str, Any], *, card: str, record: Mapping[str, Any]
) -> None:
    """Write the files that accompany the weights: tokenizer, configs, model card and record of origin."""
    copy_tokenizer(model.tokenizer_folder, folder, chat_template=model.chat_template)
    write_json(folder / "config.json", dict(config))
    write_json(folder / "generation_config.json", dict(model.generation_config))
    write_text(folder / "README.md", card)
    write_json(folder / RECORD, dict(record))


def stored_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return config.json for unquantised weights, without custom code.

    `dtype` is stored under both keys that readers use, the current and the old one.
    """
    dropped = ("quantization", "quantization_config", "auto_map", "_name_or_path")
    stored = {key: value for key, value in config.items() if key not in dropped}
    family = FAMILIES.get(str(config.get("model_type")))
    if "architectures" not in stored and family:
        stored["architectures"] = [family.architecture]
    return {**stored, "dtype": dtype, "torch_dtype": dtype}
