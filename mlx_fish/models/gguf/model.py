"""Read a GGUF file as a Hugging Face model: config, tensor names, shapes and values. Supports qwen2 and llama.

Converts llama.cpp's conventions to Hugging Face's: dimension order, tensor names, and for llama the order of
the rows of q and k, where llama.cpp rotates the pairs (0, 1) and Hugging Face (0, n/2). Loads no framework.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fish.errors import FishError
from mlx_fish.models.families import FAMILIES, NAMES
from mlx_fish.models.gguf.reader import GgufFile
from mlx_fish.storage.tensors import Float32

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_END_OF_TEXT_TOKENS = ("<|endoftext|>", "<|end_of_text|>")
_NUM_COMPARED_ROWS = 1024
# Llama 3.1 and 3.2 scale each rotary frequency differently; GGUF stores only the resulting factors.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class _TensorSource:
    """The GGUF tensor behind a Hugging Face tensor.

    Attributes:
        shape: the shape of both.
        heads: the number of heads if the rows are in llama.cpp's rotary order, else None.
    """

    gguf_name: str
    shape: tuple[int, ...]
    heads: int | None = None


class GgufModel:
    """A causal language model in a GGUF file, with the config and tensors of a Hugging Face model.

    Raises:
        FishError: the architecture or a feature is not supported, or the file lacks a tensor or has an
            unknown one.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = GgufFile(path)
        self.architecture = self._read_text("general.architecture")
        if self.architecture not in FAMILIES:
            raise FishError(
                f"{path} has the architecture {self.architecture}; from GGUF, mlx-fish supports only {NAMES}."
            )
        self.family = FAMILIES[self.architecture]
        self._check_kind()
        self.config = self._make_config()
        self._sources = self._find_sources()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face tensor name -> shape, in model order, without a tied head."""
        return {name: source.shape for name, source in self._sources.items()}

    @property
    def dtype(self) -> str:
        """The dtype of most weights; bfloat16 if they are quantised."""
        num_elements: dict[str, int] = {}
        for tensor in self.file.tensors.values():
            num_elements[tensor.type_name] = num_elements.get(tensor.type_name, 0) + math.prod(tensor.shape)
        dominant = max(num_elements, key=lambda type_name: num_elements[type_name])
        return {"F32": "float32", "F16": "float16"}.get(dominant, "bfloat16")

    def read(self, name: str, *, rows: int | None = None) -> Float32:
        """Return a tensor by its Hugging Face name as float32, or only its first `rows` rows."""
        source = self._sources[name]
        if source.heads is None:
            return self.file.read(source.gguf_name, rows=rows)
        return _to_half_rotation(self.file.read(source.gguf_name), source.heads)[:rows]

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template, if there is one."""
        template = self.file.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def generation_config(self) -> dict[str, Any]:
        """The contents of generation_config.json: the ids of the BOS, end and padding tokens."""
        token_ids = {
            "bos_token_id": self.config["bos_token_id"],
            "eos_token_id": self.end_token_ids or None,
            "pad_token_id": self.file.metadata.get("tokenizer.ggml.padding_token_id"),
        }
        return {key: value for key, value in token_ids.items() if value is not None}

    @cached_property
    def end_token_ids(self) -> list[int]:
        """The ids of the tokens that end generation: end of turn and end of text."""
        metadata = self.file.metadata
        ids = [metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")]
        tokens = metadata.get("tokenizer.ggml.tokens") or []
        types = metadata.get("tokenizer.ggml.token_type") or []
        ids += [i for i, kind in enumerate(types) if kind == 3 and i < len(tokens) and tokens[i] in _END_OF_TEXT_TOKENS]
        return list(dict.fromkeys(i for i in ids if isinstance(i, int)))

    def _check_kind(self) -> None:
        """Raise a FishError unless the file is a complete dense model."""
        metadata = self.file.metadata
        if metadata.get("general.type", "model") != "model":
            raise FishError(
                f"{self.path} contains a {metadata['general.type']}; a GGUF file with a full model was expected."
            )
        if metadata.get("split.count", 0) not in (0, 1):
            raise FishError(
                f"{self.path} is one part of a split GGUF file; join the parts with `llama-gguf-split --merge` first."
            )
        if metadata.get(f"{self.architecture}.expert_count", 0) != 0:
            raise FishError(f"{self.path} is a mixture of experts; from GGUF, mlx-fish supports only dense models.")

    def _make_config(self) -> dict[str, Any]:
        """Return the Hugging Face config that corresponds to the metadata."""
        hidden_size, heads = self._read_count("embedding_length"), self._read_count("attention.head_count")
        kv_heads = self._read_count("attention.head_count_kv", heads)
        head_dim = self._read_count("attention.key_length", hidden_size // heads)
        embedding = self.file.tensors.get("token_embd.weight")
        if heads % kv_heads or len(embedding.shape if embedding else ()) != 2:
            raise FishError(
                f"{self.path} has no token embedding, or {heads} heads are not a multiple of {kv_heads} key-value "
                "heads; download it again."
            )
        if self._read_count("rope.dimension_count", head_dim) != head_dim:
            raise FishError(
                f"{self.path} uses partial rotary embeddings (rope.dimension_count), which mlx-fish does not support."
            )
        assert embedding is not None
        config: dict[str, Any] = {
            "architectures": [self.family.architecture],
            "model_type": self.architecture,
            "attention_dropout": 0.0,
            "bos_token_id": self.file.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.file.metadata.get("tokenizer.ggml.eos_token_id"),
            "hidden_act": "silu",
            "hidden_size": hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self._read_count("feed_forward_length"),
            "max_position_embeddings": self._read_count("context_length"),
            "num_attention_heads": heads,
            "num_hidden_layers": self._read_count("block_count"),
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": self._read_float("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._read_float("rope.freq_base", 10000.0),
            "tie_word_embeddings": self._is_tied(),
            "use_cache": True,
            "vocab_size": embedding.shape[0],
        }
        if not self.family.qkv_bias:
            config["attention_bias"] = "blk.0.attn_output.bias" in self.file.tensors
        config |= self.family.config_keys
        if self.family.has_head_dim:
            config["head_dim"] = head_dim
        if not self.family.has_head_dim and head_dim * heads != hidden_size:
            raise FishError(
                f"{self.path} has heads of {head_dim} (attention.key_length); {hidden_size // heads} was expected."
            )
        if scaling := self._rope_scaling(head_dim, config["rope_theta"]):
            config["rope_scaling"] = scaling
        return config

    def _find_sources(self) -> dict[str, _TensorSource]:
        """Return Hugging Face name -> tensor source, checked against the tensors in the file."""
        sources = self._expected_sources()
        for source in sources.values():
            tensor = self.file.tensors.get(source.gguf_name)
            if tensor is None:
                raise FishError(f"{self.path} lacks the tensor {source.gguf_name}; download it again.")
            if tensor.shape != source.shape:
                raise FishError(
                    f"{self.path}: {source.gguf_name} has the shape {tensor.shape}; {source.shape} was expected."
                )
        known = {source.gguf_name for source in sources.values()} | {*_EMBEDDINGS, "rope_freqs.weight"}
        if unknown := [name for name in self.file.tensors if name not in known]:
            raise FishError(
                f"{self.path} contains {unknown[0]}, which mlx-fish does not support in {self.architecture} models."
            )
        return sources

    def _expected_sources(self) -> dict[str, _TensorSource]:
        """Return the sources of all tensors that a model with this config has."""
        config, permuted = self.config, self.family.gguf_rotary_pairs
        hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim", hidden // heads)
        with_bias = {"attn_q", "attn_k", "attn_v"} if self.family.qkv_bias else set()
        if config.get("attention_bias"):
            with_bias = {"attn_q", "attn_k", "attn_v", "attn_output"}
        parts: dict[str, tuple[tuple[int, ...], int | None]] = {
            "attn_norm": ((hidden,), None),
            "attn_q": ((heads * head_dim, hidden), heads if permuted else None),
            "attn_k": ((kv_heads * head_dim, hidden), kv_heads if permuted else None),
            "attn_v": ((kv_heads * head_dim, hidden), None),
            "attn_output": ((hidden, heads * head_dim), None),
            "ffn_norm": ((hidden,), None),
            "ffn_gate": ((intermediate, hidden), None),
            "ffn_up": ((intermediate, hidden), None),
            "ffn_down": ((hidden, intermediate), None),
        }
        sources = {"model.embed_tokens.weight": _TensorSource(self._embedding_name(), (vocab, hidden))}
        for layer in range(config["num_hidden_layers"]):
            for part, (shape, rotary_heads) in parts.items():
                name, gguf_name = f"model.layers.{layer}.{_BLOCK_NAMES[part]}", f"blk.{layer}.{part}"
                sources[f"{name}.weight"] = _TensorSource(f"{gguf_name}.weight", shape, rotary_heads)
                if part in with_bias:
                    sources[f"{name}.bias"] = _TensorSource(f"{gguf_name}.bias", shape[:1], rotary_heads)
        sources["model.norm.weight"] = _TensorSource("output_norm.weight", (hidden,))
        if not config["tie_word_embeddings"]:
            sources["lm_head.weight"] = _TensorSource("output.weight", (vocab, hidden))
        return sources

    @cached_property
    def _head_equals_embedding(self) -> bool:
        """Whether the stored head is a copy of the embedding, possibly quantised differently.

        Compares the relative RMS difference of the two. Rounding to b bits changes a weight by about 2^(1-b)
        relative to the tensor's RMS, and twice that is allowed. The head of an untied model is unrelated to
        its embedding.
        """
        embedding, head = (self.file.tensors[name] for name in _EMBEDDINGS)
        if head.shape != embedding.shape:
            return False
        a, b = (self.file.read(name, rows=_NUM_COMPARED_ROWS) for name in _EMBEDDINGS)
        difference = math.sqrt(float(np.mean((a - b) ** 2)) / max(float(np.mean(a**2)), 1e-30))
        return difference < 1e-4 + 2 * sum(2 ** (1 - tensor.bits_per_weight) for tensor in (head, embedding))

    def _is_tied(self) -> bool:
        return "output.weight" not in self.file.tensors or self._head_equals_embedding

    def _embedding_name(self) -> str:
        """Return the GGUF name of the embedding; of the more precise copy if a tied model stores two."""
        tensors = self.file.tensors
        if "output.weight" in tensors and self._is_tied():
            return max(_EMBEDDINGS, key=lambda name: tensors[name].bits_per_weight)
        return "token_embd.weight"

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        metadata, prefix = self.file.metadata, f"{self.architecture}.rope."
        scaling_type = metadata.get(
            f"{prefix}scaling.type", "linear" if f"{prefix}scale_linear" in metadata else "none"
        )
        factor = self._read_float("rope.scaling.factor", metadata.get(f"{prefix}scale_linear", 1.0))
        if "rope_freqs.weight" in self.file.tensors:
            return self._llama3_scaling(head_dim, theta)
        if scaling_type == "linear" and factor != 1.0:
            return {"rope_type": "linear", "type": "linear", "factor": factor}
        if scaling_type not in ("none", "linear"):
            raise FishError(
                f"{self.path} uses the RoPE scaling {scaling_type}; from GGUF, mlx-fish supports only none, linear "
                "and llama3."
            )
        return None

    def _llama3_scaling(self, head_dim: int, theta: float) -> dict[str, Any]:
        """Return the `rope_scaling` config of Llama 3 that produces the stored factors."""
        stored_factors = self.file.read("rope_freqs.weight")
        factor = float(stored_factors.max())
        if stored_factors.shape != (head_dim // 2,) or not np.allclose(
            stored_factors, llama3_factors(head_dim, theta, factor), rtol=1e-3
        ):
            raise FishError(
                f"{self.path} scales its rotary frequencies (rope_freqs) in a way that mlx-fish does not support."
            )
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}

    def _read_text(self, key: str) -> str:
        value = self.file.metadata.get(key)
        if not isinstance(value, str):
            raise FishError(f"{self.path} lacks the metadata {key}; download it again.")
        return value

    def _read_count(self, key: str, default: int | None = None) -> int:
        """Return a positive integer of this architecture; a list of equal values, one per layer, is one value."""
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise FishError(
                f"{self.path}: {self.architecture}.{key} differs between layers, which mlx-fish does not support."
            )
        if not isinstance(value, int) or value <= 0:
            raise FishError(f"{self.path}: {self.architecture}.{key} is {value}; a positive number was expected.")
        return value

    def _read_float(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number of this architecture."""
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise FishError(f"{self.path}: {self.architecture}.{key} is {value}; a positive number was expected.")
        return float(str(np.float32(value)))  # the shortest decimal: 1e-06 instead of the float32's 9.99999997e-07


def llama3_factors(head_dim: int, theta: float, factor: float) -> Float32:
    """Return the divisors of the rotary frequencies in Llama 3's RoPE scaling, (head_dim / 2,).

    llama.cpp stores them as `rope_freqs`.

    Args:
        theta: the RoPE base.
        factor: the largest divisor, which applies to low frequencies.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    num_rotations = _LLAMA3_ROPE["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    smooth = np.clip((num_rotations - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _to_half_rotation(array: Float32, heads: int) -> Float32:
    """Reorder the rows of q or k from llama.cpp's rotary order to Hugging Face's.

    llama.cpp stores the two rows of a rotary pair next to each other, Hugging Face half a head apart.

    Args:
        array: (heads * head_dim, in) or (heads * head_dim,).
    """
    half = array.shape[0] // heads // 2
    return np.ascontiguousarray(array.reshape(heads, half, 2, -1).swapaxes(1, 2)).reshape(array.shape)
