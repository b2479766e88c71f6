"""Write a merged model as a GGUF file for llama.cpp and Ollama: weights, tokenizer and chat template.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, written with the `gguf` package. It
follows llama.cpp's conventions: dimensions are reversed, and for llama (not for qwen2) the rows of q and k
are in llama.cpp's rotary order (`to_rotary_pairs`). Independent of LoRA.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_fish import __version__
from mlx_fish.errors import FishError
from mlx_fish.export.gguf_types import GGUF_TYPES, as_read, encoded, ggml_type, num_bytes, tensor_type
from mlx_fish.export.gguf_vocab import vocabulary
from mlx_fish.export.writer import MergedModel
from mlx_fish.models.families import FAMILIES, NAMES
from mlx_fish.models.gguf.model import llama3_factors
from mlx_fish.storage.tensors import Float32

_ROPE_FREQUENCIES = "rope_freqs.weight"


class GgufWriter:
    """Writer of one GGUF file. Implements `mlx_fish.export.writer.Writer`."""

    def __init__(self, path: Path, model: MergedModel, *, file_type: str):
        """Write everything but the weights.

        Args:
            file_type: a key of `gguf_types.GGUF_TYPES`.

        Raises:
            FishError: the exporter does not support this architecture, a feature of it, or the tokenizer.
        """
        self.dtype = file_type
        self.model = model
        self._heads = rotary_heads(model.config)
        self._names = tensor_names(model.shapes, model.config)
        self._types = {name: self._type_of(name) for name in model.shapes}
        self.num_bytes = sum(num_bytes(model.shapes[name], kind) for name, kind in self._types.items())
        self._writer = self._begin(path)

    def put(self, name: str, array: Float32) -> int:
        """Write the next tensor, float32, and return its stored size in bytes.

        Raises:
            FishError: a value is too large for float16.
        """
        assert array.shape == self.model.shapes[name], (name, array.shape)
        return self._write(encoded(self._reordered(name, array), self._types[name], name))

    def as_read(self, name: str, array: Float32) -> Float32:
        """Return `array`, some complete rows of a tensor, as a reader sees it: float32, same shape."""
        return as_read(array, self._types[name], name)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, pieces: Any) -> int:
        """Write a tensor piece by piece; `write_tensor_data` would need the complete tensor in memory."""
        file = self._writer.fout[0]
        start = file.tell()
        for piece in pieces:
            file.write(piece)
        written: int = file.tell() - start
        self._writer.write_padding(file, written)
        return written

    def _reordered(self, name: str, array: Float32) -> Float32:
        """Return the tensor with its rows in llama.cpp's order."""
        heads = self._heads.get(name.split(".")[-2])
        return to_rotary_pairs(array, heads) if heads else array

    def _type_of(self, name: str) -> str:
        config = self.model.config
        return tensor_type(
            self._names[name],
            self.model.shapes[name],
            file_type=self.dtype,
            num_blocks=int(config["num_hidden_layers"]),
            tied=bool(config.get("tie_word_embeddings")),
        )

    def _begin(self, path: Path) -> Any:
        """Write the metadata and the tensor index, and return the open `gguf.GGUFWriter`."""
        import gguf

        frequencies = rope_factors(self.model.config)
        writer = gguf.GGUFWriter(path, str(self.model.config["model_type"]))
        writer.add_type("model")
        add_model_keys(writer, self.model)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[GGUF_TYPES[self.dtype][0]])
        add_config_keys(writer, self.model.config)
        self._add_tokenizer(writer)
        if frequencies is not None:
            writer.add_tensor_info(_ROPE_FREQUENCIES, frequencies.shape, np.dtype(np.float32), frequencies.nbytes)
        for name, shape in self.model.shapes.items():
            kind = self._types[name]
            size = num_bytes(shape, kind)
            writer.add_tensor_info(self._names[name], shape, np.dtype(np.float32), size, ggml_type(kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        self._writer = writer
        writer.write_padding(writer.fout[0], writer.fout[0].tell())
        if frequencies is not None:
            self._write([frequencies.tobytes()])
        return writer

    def _add_tokenizer(self, writer: Any) -> None:
        model = self.model
        keys = vocabulary(
            model.tokenizer_folder,
            vocab_size=int(model.config["vocab_size"]),
            generation_config=model.generation_config,
            chat_template=model.own_template(),
        )
        for key, value in keys.items():
            name = f"tokenizer.ggml.{key}"
            if isinstance(value, bool):
                writer.add_bool(name, value)
            elif isinstance(value, int):
                writer.add_uint32(name, value)
            elif isinstance(value, str):
                writer.add_string(name, value)
            else:
                writer.add_array(name, value)
        if template := model.own_template():
            writer.add_chat_template(template)


def check_architecture(config: Mapping[str, Any]) -> None:
    """Check that this architecture can be written to GGUF.

    Raises:
        FishError: the exporter or llama.cpp does not support the model type, its attention or its RoPE
            scaling.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise FishError(
            f"a {kind} model cannot be written to GGUF by mlx-fish, which supports only {NAMES}; use "
            "--to-hf and llama.cpp's own converter."
        )
    if config.get("use_sliding_window"):
        raise FishError(
            "this model uses sliding-window attention, which llama.cpp does not support for qwen2; use --to-hf."
        )
    rope_factors(config)


def tensor_names(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, str]:
    """Return a mapping from Hugging Face tensor names to GGUF tensor names.

    Raises:
        FishError: a tensor has no GGUF name in this architecture.
    """
    import gguf

    architecture = gguf.MODEL_ARCH[str(config["model_type"]).upper()]
    name_map = gguf.get_tensor_name_map(architecture, int(config["num_hidden_layers"]))
    names = {name: name_map.get_name(name, try_suffixes=(".weight", ".bias")) for name in shapes}
    for name, gguf_name in names.items():
        if gguf_name is None:
            raise FishError(f"the tensor {name} has no GGUF name in a {config['model_type']} model; use --to-hf.")
    return names


def rotary_heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the layers whose rows llama.cpp stores in rotary order, with their number of heads."""
    if not FAMILIES[str(config["model_type"])].gguf_rotary_pairs:
        return {}
    heads = int(config["num_attention_heads"])
    return {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}


def to_rotary_pairs(array: Float32, heads: int) -> Float32:
    """Reorder the rows of q or k, (out, ...), from Hugging Face's to llama.cpp's rotary order.

    RoPE rotates the features of a head in pairs. In a head of n rows, Hugging Face pairs row i with row i +
    n/2, and llama.cpp pairs rows 2i and 2i + 1:

        Hugging Face   0 1 2 3 | 4 5 6 7       pairs (0, 4) (1, 5) (2, 6) (3, 7)
        llama.cpp      0 4 1 5 2 6 3 7         the same pairs, next to each other
    """
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def add_model_keys(writer: Any, model: MergedModel) -> None:
    """Add the keys that describe the model's name and origin, for people and for the Hub."""
    writer.add_name(model.name)
    writer.add_quantized_by(f"mlx-fish {__version__}")
    if model.license:
        writer.add_license(model.license)
    if model.base_name:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, model.base_name.rsplit("/", 1)[-1])
        if "/" in model.base_name:
            writer.add_base_model_organization(0, model.base_name.split("/", 1)[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{model.base_name}")


def add_config_keys(writer: Any, config: Mapping[str, Any]) -> None:
    """Add the keys of the architecture: sizes, norm and RoPE settings."""
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(hidden)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(config.get("rope_theta") or 10000.0))
    writer.add_vocab_size(int(config["vocab_size"]))
    if FAMILIES[str(config["model_type"])].has_head_dim:
        writer.add_rope_dimension_count(head_dim)
    if head_dim != hidden // heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    kind, scaling = _rope_scaling(config)
    if kind in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))


def rope_factors(config: Mapping[str, Any]) -> npt.NDArray[np.float32] | None:
    """Return the frequency factors of Llama 3's RoPE scaling, (head_dim / 2,), which GGUF stores as a tensor.

    Returns None without scaling, and for scalings that GGUF stores as metadata.

    Raises:
        FishError: GGUF, as written here, cannot express this RoPE scaling.
    """
    kind, scaling = _rope_scaling(config)
    if kind in ("default", "linear", "yarn"):
        return None
    llama3_defaults = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind != "llama3" or any(scaling.get(key) != value for key, value in llama3_defaults.items()):
        raise FishError(
            f"this model uses RoPE scaling of type {kind}, which mlx-fish cannot write to GGUF; use --to-hf."
        )
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return llama3_factors(head_dim, float(config["rope_theta"]), float(scaling["factor"]))


def _rope_scaling(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the type of the RoPE scaling and its settings."""
    scaling = config.get("rope_scaling") or {}
    return str(scaling.get("rope_type", scaling.get("type", "default"))), scaling
