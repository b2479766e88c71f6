"""A Hugging Face tokenizer folder -> the `tokenizer.ggml.*` keys of a GGUF file.

Reads tokenizer.json as data, so that nothing but the `tokenizers` library is needed. Knows the two kinds that llama.cpp
reads for qwen2 and llama models: byte-level BPE (`gpt2`) and SentencePiece BPE with byte fallback (`llama`). A rule for
cutting text that llama.cpp is not known to share is refused: the model would read other tokens than it was tuned on.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fish.errors import FishError
from mlx_fish.models.gguf.tokenizer import PRE_TOKENIZERS
from mlx_fish.storage.files import read_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary(
    folder: Path, *, vocab_size: int, generation_config: Mapping[str, Any], chat_template: str | None = None
) -> dict[str, Any]:
    """The keys, `tokenizer.ggml.` left out, and `tokenizer.chat_template` not among them.

    Args:
        folder: holds tokenizer.json.
        vocab_size: rows of the embedding; unused ids are padded with `[PADi]`.
        generation_config: its end tokens become eos and eot.
        chat_template: what the model was tuned with; when it begins a prompt without BOS, llama.cpp must add none.

    Raises:
        FishError: a tokenizer of another kind, or one that is larger than the embedding.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FishError(f"{folder} has no tokenizer.json; fetch the tokenizer files of the model.")
    stored = read_json(path)
    model = stored.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise FishError(f"{path} is no BPE tokenizer; only BPE ones can be written to GGUF.")
    added = [token for token in stored.get("added_tokens", []) if isinstance(token, dict)]
    tokens, types = _tokens(model["vocab"], added, model.get("unk_token"), vocab_size, path)
    keys: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if model.get("byte_fallback"):
        keys |= {"model": "llama", "pre": "default", "scores": _scores(model, tokens, types)}
        keys["add_space_prefix"] = '"Prepend"' in _compact(stored.get("normalizer")) or '"prepend_scheme":"first"' in (
            _compact(stored.get("pre_tokenizer"))
        )
    else:
        keys |= {"model": "gpt2", "pre": _pre_tokenizer(stored, path), "merges": _merges(model)}
        if not keys["merges"]:
            raise FishError(f"{path} has no merges, and llama.cpp reads no such vocabulary; use --to-hf.")
    keys |= _special_ids(path, tokens, generation_config)
    if keys["add_bos_token"] and chat_template is not None:
        bos = tokens[keys["bos_token_id"]]
        keys["add_bos_token"] = "bos_token" in chat_template or bos in chat_template
    return keys


def _tokens(
    vocab: dict[str, int], added: list[dict[str, Any]], unknown: Any, vocab_size: int, path: Path
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    marked = {token["content"]: _CONTROL if token.get("special") else _USER_DEFINED for token in added}
    for token, index in [*vocab.items(), *((token["content"], token["id"]) for token in added)]:
        if not 0 <= index < vocab_size:
            raise FishError(f"{path} has the token {token!r} with id {index}; the model has {vocab_size} embeddings.")
        tokens[index] = token
        types[index] = marked.get(token, _BYTE if _BYTE_TOKEN.fullmatch(token) else _NORMAL)
        if token == unknown and token not in marked:
            types[index] = _UNKNOWN
    return tokens, types


def _merges(model: dict[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]


def _scores(model: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """SentencePiece merges the pair whose result scores highest: a piece scores minus the rank of its first merge."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.get("merges", [])):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    last = len(ranks)
    return [
        -float(ranks.get(token, last)) if kind == _NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)
    ]


def _pre_tokenizer(stored: dict[str, Any], path: Path) -> str:
    """llama.cpp's name of the rule by which this tokenizer cuts text before it merges."""
    parts = stored.get("pre_tokenizer") or {}
    steps = parts.get("pretokenizers", [parts]) if parts.get("type") == "Sequence" else [parts]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    pattern = patterns[0] if len(patterns) == 1 else None
    plain = byte_level and not byte_level[0].get("add_prefix_space", True)
    if plain and not patterns and byte_level[0].get("use_regex", True):
        return "gpt-2"
    for name, known in PRE_TOKENIZERS.items():
        if plain and pattern is not None and pattern == known:
            return name
    raise FishError(
        f"{path} cuts text by a rule of its own, which llama.cpp is not known to have; the rules known are those of "
        f"{', '.join(PRE_TOKENIZERS)}."
    )


def _special_ids(path: Path, tokens: list[str], generation_config: Mapping[str, Any]) -> dict[str, Any]:
    from tokenizers import Tokenizer

    settings_path = path.with_name("tokenizer_config.json")
    settings = read_json(settings_path) if settings_path.is_file() else {}
    ids = {token: index for index, token in enumerate(tokens)}

    def named(key: str) -> int | None:
        value = settings.get(key)
        token = value.get("content") if isinstance(value, dict) else value
        return ids.get(token) if isinstance(token, str) else None

    ends = generation_config.get("eos_token_id")
    ends = [end for end in (ends if isinstance(ends, list) else [ends, named("eos_token")]) if isinstance(end, int)]
    bos = named("bos_token") if named("bos_token") is not None else generation_config.get("bos_token_id")
    pad = named("pad_token") if named("pad_token") is not None else generation_config.get("pad_token_id")
    found = {
        "bos_token_id": bos,
        "eos_token_id": ends[0] if ends else None,
        "eot_token_id": ends[1] if len(ends) > 1 else None,
        "padding_token_id": pad,
        "unknown_token_id": named("unk_token"),
    }
    encoded = Tokenizer.from_file(str(path)).encode("a").ids
    keys: dict[str, Any] = {key: value for key, value in found.items() if value is not None}
    return keys | {"add_bos_token": bool(encoded) and encoded[0] == bos, "add_eos_token": False}


def _compact(value: Any) -> str:
    import json

    return json.dumps(value, separators=(",", ":"))
