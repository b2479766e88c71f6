"""What lies in a GGUF file of ours, as the `gguf` package and llama.cpp read it."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuse_models import (
    TEMPLATE,
    VOCABULARY,
    add_run_files,
    hf_logits,
    make_adapter,
    make_model,
    run_fuse,
    transformers,
)

from mlx_fish.backends.choose import load_quantizer
from mlx_fish.errors import FishError
from mlx_fish.export import base as base_module
from mlx_fish.export.fuse import fuse
from mlx_fish.export.gguf_types import as_read, encoded, ggml_type, num_bytes, tensor_type
from mlx_fish.export.gguf_vocab import vocabulary
from mlx_fish.export.targets import Target
from mlx_fish.export.verify.compare import verify_artifacts
from mlx_fish.models.convert import convert
from mlx_fish.models.folder import ModelFolder
from mlx_fish.storage.files import read_json, write_json

# The order of the blocks in files of 2024, and those to which llama-quantize gave more bits in Qwen's own Q4_K_M of the
# 0.5B model (24 blocks, read from that file). It counted blocks in file order then, and counts by number now.
FILE_ORDER = sorted(range(24), key=str)
MORE_BITS = {0, 1, 10, 13, 16, 19, 21, 3, 6, 7, 8, 9}


def test_q4_k_m_is_llama_quantizes_choice() -> None:
    def chosen(name: str, shape: tuple[int, int], tied: bool = False) -> str:
        return tensor_type(name, shape, file_type="q4_k_m", num_blocks=24, tied=tied)

    more = {number for number in range(24) if chosen(f"blk.{number}.ffn_down.weight", (896, 4864)) == "Q6_K"}
    assert {FILE_ORDER[number] for number in more} == MORE_BITS
    assert {chosen(f"blk.{number}.attn_v.weight", (128, 896)) for number in more} == {
        "Q8_0"
    }  # 896 is no multiple of 256
    assert chosen("blk.4.ffn_down.weight", (896, 4864)) == "Q4_K"
    assert chosen("blk.4.attn_v.weight", (128, 896)) == chosen("blk.0.ffn_up.weight", (4864, 896)) == "Q5_0"
    assert chosen("output.weight", (151936, 896)) == chosen("token_embd.weight", (151936, 896), tied=True) == "Q8_0"
    assert chosen("token_embd.weight", (151936, 896)) == "Q5_0"
    assert chosen("output.weight", (151936, 2048)) == "Q6_K"
    assert chosen("blk.0.attn_q.weight", (80, 80)) == "F16"  # no whole blocks of 32


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "F16", "Q5_0"])
def test_bytes_are_the_gguf_packages(kind: str) -> None:
    from gguf.quants import quantize

    array = np.random.default_rng(0).standard_normal((300, 896)).astype(np.float32)
    stored = b"".join(encoded(array, kind, "x"))
    assert stored == quantize(array, ggml_type(kind)).tobytes()
    assert len(stored) == num_bytes(array.shape, kind)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants_are_read_back_by_the_gguf_package(kind: str) -> None:
    from gguf.quants import dequantize

    array = np.random.default_rng(0).standard_normal((600, 512)).astype(np.float32)
    stored = np.frombuffer(b"".join(encoded(array, kind, "x")), np.uint8).reshape(600, -1)
    found = dequantize(stored, ggml_type(kind))
    assert np.array_equal(found, as_read(array, kind, "x"))
    assert np.sqrt(np.mean((found - array) ** 2)) < {"Q4_K": 0.1, "Q6_K": 0.03}[kind]


def test_q4_k_m_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "qwen2", tied=True)
    monkeypatch.setitem(sys.modules, "libgguf", None)
    with pytest.raises(FishError, match=r"mlx-fish\[libgguf\]"):
        fuse(
            base=base,
            adapter=make_adapter(tmp_path / "a", base),
            targets=[Target("gguf", tmp_path / "out", file_types=("q4_k_m",))],
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_metadata_and_tensors(kind: str, tmp_path: Path) -> None:
    from gguf import GGUFReader

    base = make_model(tmp_path / "base", kind, tied=kind == "qwen2")
    adapter = make_adapter(tmp_path / "adapter", base)
    add_run_files(adapter, base)
    fuse(base=base, adapter=adapter, targets=[Target("gguf", tmp_path / "out", file_types=("q8_0",))])
    reader = GGUFReader(tmp_path / "out" / "model-q8_0.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items()}
    expected = {
        "general.architecture": kind,
        "general.type": "model",
        "general.file_type": 7,
        "general.base_model.0.repo_url": "https://huggingface.co/Owner/Base",
        f"{kind}.block_count": 3,
        f"{kind}.attention.head_count_kv": 2,
        f"{kind}.rope.freq_base": 12345.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    assert {key: keys[key] for key in expected} == expected
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCABULARY
    assert tokens[3] == "<end>" and types[3] == 3 and types[4] == 1
    assert tokens[-1] == f"[PAD{VOCABULARY - 1}]" and types[-1] == 5
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert ("output.weight" in tensors) == (kind == "llama")
    assert ("blk.0.attn_q.bias" in tensors) == (kind == "qwen2")
    assert {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 1} == {"F32"}
    assert list(tensors["blk.0.ffn_down.weight"].shape) == [96, 64]  # columns first
    assert str(tmp_path).encode() not in (tmp_path / "out" / "model-q8_0.gguf").read_bytes()


def test_the_way_back(pair: Any, tmp_path: Path) -> None:
    """HF -> GGUF -> HF gives the same numbers, bit for bit, and the same tokenizer."""
    base, adapter = pair
    add_run_files(adapter, base)
    run_fuse(base, adapter, tmp_path / "hf", dtype="float32")
    fuse(base=base, adapter=adapter, targets=[Target("gguf", tmp_path / "gguf", file_types=("f32",))])
    convert(model=str(tmp_path / "gguf" / "model-f32.gguf"), out=tmp_path / "back", dtype="float32")
    assert np.array_equal(hf_logits(tmp_path / "back"), hf_logits(tmp_path / "hf"))
    there, back = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "back"))
    text = "cab 金鱼<end>"
    assert there.encode(text) == back.encode(text)
    assert back.chat_template == TEMPLATE


@pytest.mark.process
def test_llama3s_rotary_scaling_reaches_llama_cpp(tmp_path: Path) -> None:
    make_model(tmp_path / "base", "llama", tied=False)
    config = read_json(tmp_path / "base" / "config.json")
    config["rope_parameters"] |= {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    write_json(tmp_path / "base" / "config.json", config)
    base = ModelFolder(tmp_path / "base", "Owner/Base")
    adapter = make_adapter(tmp_path / "adapter", base)
    result = fuse(base=base, adapter=adapter, targets=[Target("gguf", tmp_path / "out", file_types=("f32",))])
    (comparison,) = verify_artifacts(base, adapter, result.artifacts, required=True)
    assert comparison.difference < 1e-4


def sentencepiece_tokenizer(folder: Path) -> None:
    """A SentencePiece BPE with byte fallback, as Llama 2 has it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    letters = [*"▁abdeilnot"]
    merges = [("i", "n"), ("▁", "a"), ("t", "e"), ("o", "n"), ("in", "d"), ("▁a", "t"), ("b", "l"), ("te", "d")]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    words += ["".join(pair) for pair in merges]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(words[:3])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.mark.process
def test_sentencepiece_reaches_llama_cpp(tmp_path: Path) -> None:
    """The check compares what llama.cpp's tokenizer makes of the prompts with what transformers makes of them."""
    base = make_model(tmp_path / "base", "llama", tied=False)
    sentencepiece_tokenizer(base.path)
    adapter = make_adapter(tmp_path / "adapter", base)
    result = fuse(base=base, adapter=adapter, targets=[Target("gguf", tmp_path / "out", file_types=("f32",))])
    (comparison,) = verify_artifacts(base, adapter, result.artifacts, required=True)
    assert comparison.wrong == ()
    keys = vocabulary(base.path, vocab_size=VOCABULARY, generation_config={"eos_token_id": 2})
    assert (keys["model"], keys["add_bos_token"], keys["add_space_prefix"]) == ("llama", True, True)
    assert keys["token_type"][3] == 6 and keys["token_type"][0] == 3
    chatted = vocabulary(
        base.path, vocab_size=VOCABULARY, generation_config={}, chat_template="{{ messages[0].content }}"
    )
    assert not chatted["add_bos_token"]  # training never saw one


def test_every_tensor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model(tmp_path / "base", "qwen2", tied=True)
    read, seen = base_module._FolderValues.read, []
    monkeypatch.setattr(base_module._FolderValues, "read", lambda self, name: (seen.append(name), read(self, name))[1])
    targets = [Target("hf", tmp_path / "hf"), Target("gguf", tmp_path / "gguf", file_types=("f16", "q8_0"))]
    result = fuse(base=base, adapter=make_adapter(tmp_path / "adapter", base), targets=targets)
    assert seen == list(base.weights) and len(result.artifacts) == 3


@pytest.mark.process
def test_a_quantised_base_made_from_a_gguf_file_uses_that_file(tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", "qwen2", tied=True)
    fuse(
        base=plain,
        adapter=make_adapter(tmp_path / "first", plain),
        targets=[Target("gguf", tmp_path / "gguf", file_types=("f32",))],
    )
    source = tmp_path / "gguf" / "model-f32.gguf"
    convert(model=str(source), out=tmp_path / "packed", quantizer=load_quantizer(4, 32))
    convert(model=str(source), out=tmp_path / "whole", dtype="float32")
    packed, whole = (ModelFolder(tmp_path / name, name) for name in ("packed", "whole"))
    adapter = make_adapter(tmp_path / "adapter", whole)
    result = run_fuse(packed, adapter, tmp_path / "fused", dtype="float32")
    assert (result.original, result.expanded) == (source, False)
    (comparison,) = verify_artifacts(packed, adapter, result.artifacts, required=True)
    assert comparison.difference < 1e-4
    run_fuse(whole, adapter, tmp_path / "straight", dtype="float32")
    assert np.array_equal(hf_logits(tmp_path / "fused"), hf_logits(tmp_path / "straight"))
    source.rename(tmp_path / "elsewhere.gguf")
    assert run_fuse(packed, adapter, tmp_path / "again").expanded


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mistral"}, "a mistral model cannot be written to GGUF"),
        ({"use_sliding_window": True}, "sliding-window attention"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "of type longrope"),
    ],
)
def test_what_gguf_does_not_hold_is_refused_by_name(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "qwen2", tied=True)
    write_json(base.path / "config.json", {**read_json(base.path / "config.json"), **changes})
    base = ModelFolder(base.path, "Owner/Base")
    adapter = make_adapter(tmp_path / "adapter", base)
    for target in (Target("gguf", tmp_path / "out", file_types=("f32",)), Target("gguf-adapter", tmp_path / "out")):
        with pytest.raises(FishError, match=reason):
            fuse(base=base, adapter=adapter, targets=[target])
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "qwen2", tied=True)
    stored = read_json(base.path / "tokenizer.json")
    stored["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    write_json(base.path / "tokenizer.json", stored)
    with pytest.raises(FishError, match="has a pre-tokenizer that llama.cpp is not known to support"):
        vocabulary(base.path, vocab_size=VOCABULARY, generation_config={})
    with pytest.raises(FishError, match="the model has 100 embeddings"):
        vocabulary(base.path, vocab_size=100, generation_config={})
