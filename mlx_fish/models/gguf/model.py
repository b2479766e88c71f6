"""A GGUF file seen as a Hugging Face model: config, tensor names and shapes. Knows the architectures qwen2 and llama.

llama.cpp's conventions are undone here: dimension order, tensor names, and for llama the order of the rows of q and k,
which it stores for rotary pairs (0, 1) where Hugging Face pairs (0, n/2). Loads no framework.
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
_BASE_ENDS = ("<|endoftext|>", "<|end_of_text|>")
_COMPARED_ROWS = 1024
# Llama 3.1 and 3.2 scale the rotary base by frequency; GGUF keeps only the resulting factors.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class _Place:
    """Where a Hugging Face tensor comes from. `heads` is given when its rows lie in llama.cpp's rotary order."""

    gguf_name: str
    shape: tuple[int, ...]
    heads: int | None = None


class GgufModel:
    """A causal language model in a GGUF file, read as if it were a Hugging Face folder.

    Raises:
        FishError: an architecture or a feature that is not known here, or a tensor that is missing or in the way.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = GgufFile(path)
        self.architecture = self._text("general.architecture")
        if self.architecture not in FAMILIES:
            raise FishError(f"{path} holds the architecture {self.architecture}; mlx-fish reads {NAMES} from GGUF.")
        self.family = FAMILIES[self.architecture]
        self._refuse_parts()
        self.config = self._config()
        self._places = self._find_places()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape, in the order of the model; a tied head is left out."""
        return {name: place.shape for name, place in self._places.items()}

    @property
    def dtype(self) -> str:
        """The float type in which most weights lie; bfloat16 when they are quantised."""
        sizes: dict[str, int] = {}
        for tensor in self.file.tensors.values():
            sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + math.prod(tensor.shape)
        most = max(sizes, key=lambda type_name: sizes[type_name])
        return {"F32": "float32", "F16": "float16"}.get(most, "bfloat16")

    def read(self, name: str, *, rows: int | None = None) -> Float32:
        """A tensor by its Hugging Face name, float32; only its first `rows` rows when given."""
        place = self._places[name]
        if place.heads is None:
            return self.file.read(place.gguf_name, rows=rows)
        return _to_half_rotation(self.file.read(place.gguf_name), place.heads)[:rows]

    @property
    def chat_template(self) -> str | None:
        template = self.file.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def generation_config(self) -> dict[str, Any]:
        """The end tokens (the turn's and the text's) and the ids that go with them."""
        found = {
            "bos_token_id": self.config["bos_token_id"],
            "eos_token_id": self.end_token_ids or None,
            "pad_token_id": self.file.metadata.get("tokenizer.ggml.padding_token_id"),
        }
        return {key: value for key, value in found.items() if value is not None}

    @cached_property
    def end_token_ids(self) -> list[int]:
        metadata = self.file.metadata
        ids = [metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")]
        tokens = metadata.get("tokenizer.ggml.tokens") or []
        kinds = metadata.get("tokenizer.ggml.token_type") or []
        ids += [i for i, kind in enumerate(kinds) if kind == 3 and i < len(tokens) and tokens[i] in _BASE_ENDS]
        return list(dict.fromkeys(i for i in ids if isinstance(i, int)))

    def _refuse_parts(self) -> None:
        metadata = self.file.metadata
        if metadata.get("general.type", "model") != "model":
            raise FishError(f"{self.path} holds a {metadata['general.type']}; a GGUF with a whole model was expected.")
        if metadata.get("split.count", 0) not in (0, 1):
            raise FishError(
                f"{self.path} is one part of a split file; join them with `llama-gguf-split --merge` first."
            )
        if metadata.get(f"{self.architecture}.expert_count", 0) != 0:
            raise FishError(f"{self.path} is a mixture of experts; mlx-fish reads dense models from GGUF.")

    def _config(self) -> dict[str, Any]:
        hidden_size, heads = self._count("embedding_length"), self._count("attention.head_count")
        kv_heads = self._count("attention.head_count_kv", heads)
        head_dim = self._count("attention.key_length", hidden_size // heads)
        tokens = self.file.tensors.get("token_embd.weight")
        if heads % kv_heads or len(tokens.shape if tokens else ()) != 2:
            raise FishError(f"{self.path} has no token embedding, or {heads} heads over {kv_heads}; fetch it again.")
        if self._count("rope.dimension_count", head_dim) != head_dim:
            raise FishError(
                f"{self.path} turns only a part of each head (rope.dimension_count); mlx-fish does not know that."
            )
        assert tokens is not None
        config: dict[str, Any] = {
            "architectures": [self.family.architecture],
            "model_type": self.architecture,
            "attention_dropout": 0.0,
            "bos_token_id": self.file.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.file.metadata.get("tokenizer.ggml.eos_token_id"),
            "hidden_act": "silu",
            "hidden_size": hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self._count("feed_forward_length"),
            "max_position_embeddings": self._count("context_length"),
            "num_attention_heads": heads,
            "num_hidden_layers": self._count("block_count"),
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._number("rope.freq_base", 10000.0),
            "tie_word_embeddings": self._is_tied(),
            "use_cache": True,
            "vocab_size": tokens.shape[0],
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

    def _find_places(self) -> dict[str, _Place]:
        places = self._layout()
        for place in places.values():
            tensor = self.file.tensors.get(place.gguf_name)
            if tensor is None:
                raise FishError(f"{self.path} lacks the tensor {place.gguf_name}; fetch it again.")
            if tensor.shape != place.shape:
                raise FishError(
                    f"{self.path}: {place.gguf_name} has the shape {tensor.shape}; {place.shape} was expected."
                )
        known = {place.gguf_name for place in places.values()} | {*_EMBEDDINGS, "rope_freqs.weight"}
        if unknown := [name for name in self.file.tensors if name not in known]:
            raise FishError(
                f"{self.path} holds {unknown[0]}, which mlx-fish does not know in {self.architecture} models."
            )
        return places

    def _layout(self) -> dict[str, _Place]:
        """Every tensor that a model of this config has."""
        config, permuted = self.config, self.family.gguf_rotary_pairs
        hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
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
            "ffn_gate": ((inner, hidden), None),
            "ffn_up": ((inner, hidden), None),
            "ffn_down": ((hidden, inner), None),
        }
        places = {"model.embed_tokens.weight": _Place(self._embedding(), (vocab, hidden))}
        for layer in range(config["num_hidden_layers"]):
            for part, (shape, rotary_heads) in parts.items():
                name, gguf_name = f"model.layers.{layer}.{_BLOCK_NAMES[part]}", f"blk.{layer}.{part}"
                places[f"{name}.weight"] = _Place(f"{gguf_name}.weight", shape, rotary_heads)
                if part in with_bias:
                    places[f"{name}.bias"] = _Place(f"{gguf_name}.bias", shape[:1], rotary_heads)
        places["model.norm.weight"] = _Place("output_norm.weight", (hidden,))
        if not config["tie_word_embeddings"]:
            places["lm_head.weight"] = _Place("output.weight", (vocab, hidden))
        return places

    @cached_property
    def _tied_copies(self) -> bool:
        """Whether the head is the embedding once more, quantised differently.

        Rounding to b bits changes a weight by about 2^(1-b) of the tensor's size; twice that is allowed, while the head of
        an untied model has nothing in common with its embedding.
        """
        embedding, head = (self.file.tensors[name] for name in _EMBEDDINGS)
        if head.shape != embedding.shape:
            return False
        a, b = (self.file.read(name, rows=_COMPARED_ROWS) for name in _EMBEDDINGS)
        difference = math.sqrt(float(np.mean((a - b) ** 2)) / max(float(np.mean(a**2)), 1e-30))
        return difference < 1e-4 + 2 * sum(2 ** (1 - tensor.bits_per_weight) for tensor in (head, embedding))

    def _is_tied(self) -> bool:
        return "output.weight" not in self.file.tensors or self._tied_copies

    def _embedding(self) -> str:
        """The better of two copies of a tied embedding."""
        tensors = self.file.tensors
        if "output.weight" in tensors and self._is_tied():
            return max(_EMBEDDINGS, key=lambda name: tensors[name].bits_per_weight)
        return "token_embd.weight"

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        metadata, prefix = self.file.metadata, f"{self.architecture}.rope."
        kind = metadata.get(f"{prefix}scaling.type", "linear" if f"{prefix}scale_linear" in metadata else "none")
        factor = self._number("rope.scaling.factor", metadata.get(f"{prefix}scale_linear", 1.0))
        if "rope_freqs.weight" in self.file.tensors:
            return self._llama3_scaling(head_dim, theta)
        if kind == "linear" and factor != 1.0:
            return {"rope_type": "linear", "type": "linear", "factor": factor}
        if kind not in ("none", "linear"):
            raise FishError(
                f"{self.path} uses the rope scaling {kind}; mlx-fish reads none, linear and llama3 from GGUF."
            )
        return None

    def _llama3_scaling(self, head_dim: int, theta: float) -> dict[str, Any]:
        found = self.file.read("rope_freqs.weight")
        factor = float(found.max())
        if found.shape != (head_dim // 2,) or not np.allclose(
            found, llama3_factors(head_dim, theta, factor), rtol=1e-3
        ):
            raise FishError(
                f"{self.path} scales its rotary frequencies (rope_freqs) in a way that mlx-fish does not know."
            )
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}

    def _text(self, key: str) -> str:
        value = self.file.metadata.get(key)
        if not isinstance(value, str):
            raise FishError(f"{self.path} does not say {key}; fetch it again.")
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:  # one value a layer
            value = value[0]
        if isinstance(value, list):
            raise FishError(
                f"{self.path}: {self.architecture}.{key} differs between layers; mlx-fish reads equal layers."
            )
        if not isinstance(value, int) or value <= 0:
            raise FishError(f"{self.path}: {self.architecture}.{key} is {value}; a positive number was expected.")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise FishError(f"{self.path}: {self.architecture}.{key} is {value}; a positive number was expected.")
        return float(str(np.float32(value)))  # the shortest decimal: 1e-06, which a float32 makes 9.99999997e-07


def llama3_factors(head_dim: int, theta: float, factor: float) -> Float32:
    """What llama.cpp stores as `rope_freqs`: the number by which each rotary frequency is divided, (head_dim / 2,)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = _LLAMA3_ROPE["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _to_half_rotation(array: Float32, heads: int) -> Float32:
    """Rows of q or k from llama.cpp's order (a pair side by side) to Hugging Face's (a pair half a head apart)."""
    half = array.shape[0] // heads // 2
    return np.ascontiguousarray(array.reshape(heads, half, 2, -1).swapaxes(1, 2)).reshape(array.shape)
