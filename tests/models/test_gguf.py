"""GGUF in: the format, llama.cpp's conventions undone, and the tokenizer."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_folders as tiny

from mlx_fish.errors import FishError
from mlx_fish.models.gguf import reader as gguf_reader
from mlx_fish.models.gguf.model import GgufModel, llama3_factors
from mlx_fish.models.gguf.reader import GgufFile
from mlx_fish.models.gguf.tokenizer import write_tokenizer

TYPES = gguf.GGMLQuantizationType


def write_tensors(path: Path, tensors: dict[str, tuple[np.ndarray, TYPES]]) -> Path:
    writer = gguf.GGUFWriter(path, "qwen2")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("F32", 0),
        ("F16", 5e-4),
        ("BF16", 4e-3),
        ("Q8_0", 0.01),
        ("Q5_0", 0.06),
        ("Q5_1", 0.06),
        ("Q4_0", 0.12),
        ("Q4_1", 0.12),
    ],
)
def test_written_tensors_come_back(tmp_path: Path, kind: str, error: float) -> None:
    original = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    path = write_tensors(tmp_path / "a.gguf", {"w": (gguf.quants.quantize(original, TYPES[kind]), TYPES[kind])})
    read = GgufFile(path).read("w")
    assert read.shape == original.shape and read.dtype == np.float32
    assert np.sqrt(np.mean((read - original) ** 2)) <= error
    assert np.array_equal(GgufFile(path).read("w", rows=3), read[:3])


EXPANDED = sorted(kind.name for kind in gguf.quants._type_traits)


@pytest.mark.parametrize("kind", EXPANDED)
def test_every_block_type_is_expanded_piece_by_piece_as_a_whole(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    raw = np.random.default_rng(1).integers(0, 255, (5, 1024 // block * block_bytes), dtype=np.uint8)
    path = write_tensors(tmp_path / "a.gguf", {"w": (raw, TYPES[kind])})
    monkeypatch.setattr(gguf_reader, "_PIECE", 512)
    with np.errstate(all="ignore"):
        read, expected = GgufFile(path).read("w"), gguf.quants.dequantize(raw, TYPES[kind])
    assert read.shape == (5, 1024)
    assert np.array_equal(read, expected, equal_nan=True)


def test_metadata_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "a.gguf", tiny.weights())
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: list(value) if isinstance(value, list) else value for key, value in ours.metadata.items()} == expected
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tiny.write_gguf(tmp_path / "a.gguf", tiny.weights()).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 400), *range(400, len(whole) - 1, 4999), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(FishError, match=r"cut\.gguf"):
            GgufFile(cut)


def test_damage_is_refused_in_words_or_harmless(tmp_path: Path) -> None:
    whole = tiny.write_gguf(tmp_path / "a.gguf", tiny.weights()).read_bytes()
    rng = np.random.default_rng(2)
    damaged, refused = tmp_path / "damaged.gguf", 0
    for _ in range(400):
        content = bytearray(whole)
        for at in rng.integers(0, 9000, 3):
            content[at] = rng.integers(0, 256)
        damaged.write_bytes(content)
        try:
            model = GgufModel(damaged)
            write_tokenizer(model.file.metadata, tmp_path, source=damaged)
        except FishError:
            refused += 1
    assert 50 < refused < 400


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(60), "more than fit"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(60), "more than fit"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(60), "little-endian"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 50) + bytes(60), "ends in the middle"),
    ],
)
def test_malformed_files_say_what_is_wrong(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(FishError, match=words):
        GgufFile(path)


def test_a_type_that_cannot_be_expanded_is_named(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a.gguf", {"w": (np.zeros((2, 4), np.int32), TYPES.I32)})
    with pytest.raises(FishError, match="I32"):
        GgufFile(path)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FishError, match="No such file"):
        GgufFile(tmp_path / "nothing.gguf")


def test_qwen2_keeps_its_rows_and_llama_gets_them_back(tmp_path: Path) -> None:
    for model_type in ("qwen2", "llama"):
        arrays = tiny.weights(model_type)
        model = GgufModel(tiny.write_gguf(tmp_path / f"{model_type}.gguf", arrays, model_type))
        assert list(model.shapes) == list(arrays)
        for name, array in arrays.items():
            assert np.array_equal(model.read(name), array), name
        assert model.config["rope_theta"] == 250000.0 and model.config["rms_norm_eps"] == 1e-6
        assert model.config["tie_word_embeddings"] is True and model.config["vocab_size"] == tiny.VOCAB


def test_llama_agrees_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny.write_gguf(tmp_path / "a.gguf", tiny.weights("llama", head=True), "llama")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    ours = GgufModel(path)
    assert set(ours.shapes) == set(theirs)
    for name in ours.shapes:
        assert np.array_equal(ours.read(name), theirs[name].float().numpy()), name


def test_a_head_stored_twice_is_tied_and_the_better_copy_is_used(tmp_path: Path) -> None:
    arrays = tiny.weights()
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    types = {"model.embed_tokens.weight": "Q4_0", "lm_head.weight": "Q8_0"}
    model = GgufModel(tiny.write_gguf(tmp_path / "a.gguf", arrays, types=types))
    assert model.config["tie_word_embeddings"] is True and "lm_head.weight" not in model.shapes
    assert np.abs(model.read("model.embed_tokens.weight") - arrays["lm_head.weight"]).max() < 0.005


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_a_head_of_its_own_is_kept(tmp_path: Path, kind: str) -> None:
    arrays = tiny.weights(head=True)
    nearly = arrays["model.embed_tokens.weight"] * np.float32(1 if kind != "F32" else 1.001)
    arrays["lm_head.weight"] = arrays["lm_head.weight"] if kind != "F32" else nearly
    types = {"model.embed_tokens.weight": kind, "lm_head.weight": kind}
    model = GgufModel(tiny.write_gguf(tmp_path / "a.gguf", arrays, types=types))
    assert model.config["tie_word_embeddings"] is False and "lm_head.weight" in model.shapes


def test_end_tokens_are_the_turns_and_the_texts(tmp_path: Path) -> None:
    model = GgufModel(tiny.write_gguf(tmp_path / "a.gguf", tiny.weights()))
    assert model.generation_config == {"bos_token_id": 256, "eos_token_id": [258, 256], "pad_token_id": 256}
    assert model.chat_template == tiny.TEMPLATE


@pytest.mark.parametrize(("head_dim", "factor"), [(64, 32.0), (128, 8.0)])
def test_llama3_factors_are_those_of_transformers(head_dim: int, factor: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=head_dim * 4, num_attention_heads=4, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    assert np.allclose(llama3_factors(head_dim, 500000.0, factor), plain / scaled.numpy(), rtol=1e-4)


def test_llama3_scaling_is_recognised_and_another_refused(tmp_path: Path) -> None:
    factors = llama3_factors(tiny.HIDDEN // tiny.HEADS, 250000.0, 8.0)
    path = tiny.write_gguf(tmp_path / "a.gguf", tiny.weights("llama"), "llama", extra={"rope_freqs.weight": factors})
    assert GgufModel(path).config["rope_scaling"]["factor"] == 8.0
    wrong = factors + np.linspace(0, 1, len(factors), dtype=np.float32)
    path = tiny.write_gguf(tmp_path / "b.gguf", tiny.weights("llama"), "llama", extra={"rope_freqs.weight": wrong})
    with pytest.raises(FishError, match="rope_freqs"):
        GgufModel(path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [({"split.count": 3}, "llama-gguf-split --merge"), ({"qwen2.expert_count": 8}, "mixture of experts")],
)
def test_what_is_not_read_is_named(tmp_path: Path, keys: dict[str, int], words: str) -> None:
    with pytest.raises(FishError, match=words):
        GgufModel(tiny.write_gguf(tmp_path / "a.gguf", tiny.weights(), keys=keys))


def test_other_architectures_and_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(FishError, match="architecture gemma3"):
        GgufModel(tiny.write_gguf(tmp_path / "a.gguf", tiny.weights(), "gemma3"))
    extra = {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    with pytest.raises(FishError, match=r"attn_q_norm\.weight"):
        GgufModel(tiny.write_gguf(tmp_path / "b.gguf", tiny.weights(), extra=extra))
    arrays = tiny.weights()
    del arrays["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(FishError, match=r"lacks the tensor blk\.1\.ffn_up\.weight"):
        GgufModel(tiny.write_gguf(tmp_path / "c.gguf", arrays))


TEXT = "金鱼为什么浮头？ It's 12345 degrees,\n\n  don't worry<|im_end|>\n\tcafé"


def test_byte_level_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tiny.write_gguf(tmp_path / "a.gguf", tiny.weights())
    metadata = GgufFile(path).metadata
    metadata["tokenizer.ggml.tokens"][259:261] = ["ab", "Ġd"]
    metadata["tokenizer.ggml.token_type"][259:261] = [1, 1]
    metadata["tokenizer.ggml.merges"] = ["a b", "Ġ d"]
    write_tokenizer(metadata, tmp_path, source=path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 261  # the padding is left out
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("ab c d") == [259, *tokenizer.convert_tokens_to_ids(["Ġ", "c"]), 260]
    assert tokenizer.encode("<|im_end|>") == [258] and tokenizer.eos_token_id == 258
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert (tmp_path / "chat_template.jinja").read_text() == tiny.TEMPLATE


def sentencepiece_metadata() -> dict[str, object]:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "g",
        "o",
        "l",
        "d",
        "f",
        "i",
        "s",
        "h",
    ]
    pieces += ["go", "ld", "gold", "▁gold", "fi", "sh", "fish", "▁fish", "is"]
    return {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 259 + [-1e6] * 9 + [-float(i) for i in range(9)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_tokenizer_agrees_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    metadata = sentencepiece_metadata()
    write_tokenizer(metadata, tmp_path, source=tmp_path / "a.gguf")
    ours = AutoTokenizer.from_pretrained(tmp_path)
    theirs_folder = tmp_path / "theirs"
    theirs_folder.mkdir()
    writer = gguf.GGUFWriter(theirs_folder / "a.gguf", "llama")
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        writer.add_array(key, value) if isinstance(value, list) else writer.add_key_value(
            key, value, gguf.GGUFValueType.get_type(value)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = AutoTokenizer.from_pretrained(theirs_folder, gguf_file="a.gguf")
    for text in ("goldfish gold fish", "fish  is", "鱼 goldish", "</s>"):
        assert ours.encode(text) == theirs.encode(text), text
    # As SentencePiece and llama.cpp do; transformers puts the space only at the start, and not before another one.
    assert ours.tokenize("gold</s>gold") == ["▁gold", "</s>", "▁gold"]
    assert ours.tokenize(" gold") == ["▁", "▁gold"]
    assert ours.encode("gold fish")[0] == 1 and ours.decode(ours.encode("gold 鱼")[1:]) == "gold 鱼"


def test_tokenizers_that_are_not_known_are_named(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    for changes, words in (
        ({"tokenizer.ggml.model": "t5"}, "kind t5"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}, "pre-tokenizer tekken"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer"),
        ({"tokenizer.ggml.scores": None}, "without scores"),
    ):
        with pytest.raises(FishError, match=words):
            write_tokenizer(metadata | changes, tmp_path, source=tmp_path / "a.gguf")
