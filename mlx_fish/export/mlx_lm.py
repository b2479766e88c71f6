"""Write mlx-lm's own formats: a model folder with quantised matrices, and an adapter in mlx-lm's layout.

mlx-lm reads unquantised models from a Hugging Face folder (`hf.py`). Only quantising needs MLX.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fish.adapters.peft import Adapter
from mlx_fish.adapters.spec import block_of
from mlx_fish.errors import FishError
from mlx_fish.export.hf import stored_config, write_companion_files
from mlx_fish.export.writer import MergedModel
from mlx_fish.storage.files import write_json
from mlx_fish.storage.tensors import (
    DTYPES,
    SHARD_BYTES,
    Float32,
    ShardWriter,
    Slot,
    decode,
    encode,
    encoded_pieces,
    write_safetensors,
)


class QuantizedWriter:
    """Writer of an mlx-lm folder whose matrices are quantised as mlx-lm does it: affine, the embedding included.

    Implements `mlx_fish.export.writer.Writer`.
    """

    def __init__(
        self,
        folder: Path,
        model: MergedModel,
        *,
        dtype: str,
        bits: int,
        group_size: int,
        card: str,
        record: Mapping[str, Any],
        shard_bytes: int = SHARD_BYTES,
    ):
        """Write everything but the weights.

        Args:
            dtype: dtype of scales, biases and unquantised tensors: float32, float16 or bfloat16.
            bits: bits per quantised weight.
            group_size: weights that share a scale and a bias.
            card: content of README.md.
            record: content of mlx_fish.json, the folder's origin.
            shard_bytes: maximum size of one safetensors file, bytes.

        Raises:
            FishError: MLX is not installed, or a matrix's input size is not a multiple of `group_size`.
        """
        try:
            from mlx_fish.backends.mlx.quantize import quantize_rows
        except ImportError as error:
            raise FishError(
                f"quantising for mlx-lm needs MLX ({error}); run `pip install 'mlx-fish[mlx]'`, or drop --mlx-bits."
            ) from error
        self._quantize_rows = quantize_rows
        self.dtype = f"{dtype} in {bits} bits"
        self._float, self._bits, self._group_size = dtype, bits, group_size
        slots = [slot for name, shape in model.shapes.items() for slot in self._slots(name, shape)]
        self._shards = ShardWriter(folder, slots, shard_bytes=shard_bytes)
        self.num_bytes = self._shards.num_bytes
        quantization = {"group_size": group_size, "bits": bits, "mode": "affine"}
        config = {
            **stored_config(model.config, dtype),
            "quantization": quantization,
            "quantization_config": quantization,
        }
        write_companion_files(folder, model, config, card=card, record=record)

    def put(self, name: str, array: Float32) -> int:
        """Write the next tensor, quantised if it is a matrix, and return its size in bytes."""
        if array.ndim != 2:
            return self._shards.put(encoded_pieces(array, self._float, name)).num_bytes
        packed, scales, biases = self._quantize_rows(
            array, group_size=self._group_size, bits=self._bits, dtype=self._float
        )
        size = self._shards.put([packed.tobytes()]).num_bytes
        for part, values in (("scales", scales), ("biases", biases)):
            size += self._shards.put(encoded_pieces(values, self._float, f"{name} {part}")).num_bytes
        return size

    def as_read(self, name: str, array: Float32) -> Float32:
        """Return `array` as a reader sees it: quantised or rounded as stored, in float32."""
        if array.ndim != 2:
            return decode(encode(array, self._float, name), DTYPES[self._float][0]).reshape(array.shape)
        from mlx_fish.backends.mlx.dequantize import dequantize

        sizes = {"group_size": self._group_size, "bits": self._bits}
        packed, scales, biases = self._quantize_rows(array, dtype=self._float, **sizes)
        return dequantize(packed, scales, biases, **sizes)

    def close(self) -> None:
        """Complete the files."""
        self._shards.close()

    def _slots(self, name: str, shape: tuple[int, ...]) -> list[Slot]:
        """Return the stored tensors of one tensor: itself, or its packed weights, scales and biases."""
        stored = DTYPES[self._float][0]
        if len(shape) != 2:
            return [Slot(name, stored, shape)]
        rows, columns = shape
        if columns % self._group_size:
            raise FishError(
                f"{name} has {columns} inputs, not a multiple of the group size {self._group_size}; drop --mlx-bits."
            )
        module, groups = name.removesuffix(".weight"), columns // self._group_size
        return [
            Slot(name, "U32", (rows, columns * self._bits // 32)),
            Slot(f"{module}.scales", stored, (rows, groups)),
            Slot(f"{module}.biases", stored, (rows, groups)),
        ]


def write_mlx_adapter(folder: Path, adapter: Adapter, model: MergedModel) -> int:
    """Write `adapters.safetensors` and `adapter_config.json` for mlx-lm; return the size of the tensors in bytes.

    mlx-lm has one rank and one scale per adapter: smaller matrices are padded with zeros, and differing
    scales are folded into lora_b. It counts the adapted blocks from the last one.
    """
    assert not adapter.magnitudes, "DoRA is rejected before"
    spec = adapter.spec
    rank = max(layer.rank for layer in spec.layers.values())
    scales = {layer.scale for layer in spec.layers.values()}
    scale = scales.copy().pop() if len(scales) == 1 else 1.0
    arrays: dict[str, Float32] = {}
    for module, layer in spec.layers.items():
        a, b = adapter.factors(module)
        padding = rank - layer.rank
        if len(scales) > 1:
            b = b * np.float32(layer.scale)
        arrays[f"{module}.lora_a"] = np.ascontiguousarray(np.pad(a, ((0, padding), (0, 0))).T)
        arrays[f"{module}.lora_b"] = np.ascontiguousarray(np.pad(b, ((0, 0), (0, padding))).T)
    config = {
        "model": model.base_name,
        "fine_tune_type": "lora",
        "num_layers": int(model.config["num_hidden_layers"]) - min(block_of(module) for module in spec.layers),
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": spec.dropout,
            "keys": sorted({module.split(".", 3)[3] for module in spec.layers}),
        },
    }
    write_json(folder / "adapter_config.json", config)
    write_safetensors(folder / "adapters.safetensors", arrays, {"format": "mlx"})
    return sum(array.nbytes for array in arrays.values())
