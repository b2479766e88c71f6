"""A merged model -> a complete Hugging Face folder that transformers, mlx-lm, vLLM and Ollama read.

The format: https://huggingface.co/docs/transformers. Knows nothing about LoRA, nor where the folder will finally lie.
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
    """Writes weights, configs, tokenizer, template and model card into an empty folder; see `mlx_fish.export.writer.Writer`."""

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
        """Write all but the weights.

        Args:
            dtype: float32, float16 or bfloat16, the stored type of every tensor.
            card: README.md.
            record: mlx_fish.json, what the folder came from.

        Raises:
            FishError: no tokenizer.
        """
        self.dtype = dtype
        slots = [Slot(name, DTYPES[dtype][0], shape) for name, shape in model.shapes.items()]
        self._shards = ShardWriter(folder, slots, shard_bytes=shard_bytes)
        self.num_bytes = self._shards.num_bytes
        write_beside(folder, model, stored_config(model.config, dtype), card=card, record=record)

    def put(self, name: str, array: Float32) -> int:
        """Raises FishError for a value too large for float16."""
        slot = self._shards.put(encoded_pieces(array, self.dtype, name))
        assert (slot.name, slot.shape) == (name, array.shape), (slot, name, array.shape)
        return slot.num_bytes

    def as_read(self, name: str, array: Float32) -> Float32:
        if self.dtype == "float32":
            return array
        return decode(encode(array, self.dtype, name), DTYPES[self.dtype][0]).reshape(array.shape)

    def close(self) -> None:
        self._shards.close()


def write_beside(
    folder: Path, model: MergedModel, config: Mapping[str, Any], *, card: str, record: Mapping[str, Any]
) -> None:
    """What lies beside the weights."""
    copy_tokenizer(model.tokenizer_folder, folder, chat_template=model.chat_template)
    write_json(folder / "config.json", dict(config))
    write_json(folder / "generation_config.json", dict(model.generation_config))
    write_text(folder / "README.md", card)
    write_json(folder / RECORD, dict(record))


def stored_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for plain weights in `dtype` (named in the new form and the old): no quantisation, no code to run."""
    dropped = ("quantization", "quantization_config", "auto_map", "_name_or_path")
    stored = {key: value for key, value in config.items() if key not in dropped}
    family = FAMILIES.get(str(config.get("model_type")))
    if "architectures" not in stored and family:
        stored["architectures"] = [family.architecture]
    return {**stored, "dtype": dtype, "torch_dtype": dtype}
