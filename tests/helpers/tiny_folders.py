"""Tiny random models for tests: Hugging Face folders and GGUF files, made by hand so that nothing is assumed twice."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from mlx_fish.storage.tensors import write_shards

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCAB = 64, 96, 2, 4, 2, 320
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def config(model_type: str = "qwen2", **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if model_type == "qwen2" else "LlamaForCausalLM"],
        "model_type": model_type,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": 128,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 250000.0,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
        "dtype": "float32",
    }
    return found | changes


def weights(model_type: str = "qwen2", *, head: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by their Hugging Face names, large enough that every layer matters to the logits."""
    rng = np.random.default_rng(seed)
    kv = HIDDEN // HEADS * KV_HEADS

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.15).astype(np.float32)

    found = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        found[p + "input_layernorm.weight"] = 1 + matrix(HIDDEN)
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv)):
            found[f"{p}self_attn.{name}_proj.weight"] = matrix(rows, HIDDEN)
            if model_type == "qwen2":
                found[f"{p}self_attn.{name}_proj.bias"] = matrix(rows)
        found[p + "self_attn.o_proj.weight"] = matrix(HIDDEN, HIDDEN)
        found[p + "post_attention_layernorm.weight"] = 1 + matrix(HIDDEN)
        found[p + "mlp.gate_proj.weight"] = matrix(INNER, HIDDEN)
        found[p + "mlp.up_proj.weight"] = matrix(INNER, HIDDEN)
        found[p + "mlp.down_proj.weight"] = matrix(HIDDEN, INNER)
    found["model.norm.weight"] = 1 + matrix(HIDDEN)
    if head:
        found["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    return found


def byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_tokenizer(folder: Path) -> None:
    tokens = byte_alphabet()
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_folder(
    folder: Path,
    arrays: dict[str, np.ndarray] | None = None,
    *,
    dtype: str = "float32",
    shard_bytes: int = 1 << 40,
    **config_changes: Any,
) -> Path:
    """A Hugging Face folder as transformers 4 left it: only the older rope form, the template inside the config."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = weights() if arrays is None else arrays
    shapes = {name: array.shape for name, array in arrays.items()}
    write_shards(folder, shapes, arrays.__getitem__, dtype=dtype, shard_bytes=shard_bytes)
    (folder / "config.json").write_text(json.dumps(config(**config_changes)))
    write_tokenizer(folder)
    return folder


def to_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a llama q or k as llama.cpp stores them: row i of a head's first half beside row i of its second half."""
    per_head = array.shape[0] // heads
    order = [h * per_head + i + half for h in range(heads) for i in range(per_head // 2) for half in (0, per_head // 2)]
    return array[order]


_GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, kind = name.rsplit(".", 1)
    if module in whole:
        return f"{whole[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_GGUF_PARTS[part]}.{kind}"


def write_gguf(
    path: Path,
    arrays: dict[str, np.ndarray],
    model_type: str = "qwen2",
    *,
    types: dict[str, str] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    keys: dict[str, int] | None = None,
) -> Path:
    """A GGUF file made with the gguf package's writer.

    Args:
        types: Hugging Face name -> a quantisation type; F32 when not named.
        extra: more tensors, by their GGUF names.
        keys: more integer metadata.
    """
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, model_type)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(250000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens = byte_alphabet() + SPECIAL
    padding = [f"[PAD{i}]" for i in range(len(tokens), VOCAB)]
    writer.add_token_list(tokens + padding)
    writer.add_token_types([1] * 256 + [3] * len(SPECIAL) + [5] * len(padding))
    writer.add_token_merges(["a b"] if "ab" in tokens else [])
    writer.add_eos_token_id(258)
    writer.add_bos_token_id(256)
    writer.add_pad_token_id(256)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for key, value in (keys or {}).items():
        writer.add_uint32(key, value)
    for name, array in arrays.items():
        if model_type == "llama" and "self_attn.q_proj" in name:
            array = to_pairs(array, HEADS)
        if model_type == "llama" and "self_attn.k_proj" in name:
            array = to_pairs(array, KV_HEADS)
        kind = gguf.GGMLQuantizationType[(types or {}).get(name, "F32")]
        data = gguf.quants.quantize(array, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
