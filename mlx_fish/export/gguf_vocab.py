"""Convert a Hugging Face tokenizer to the `tokenizer.ggml.*` keys of a GGUF file.

Reads tokenizer.json as data, so only the `tokenizers` library is needed. Supports the two kinds that
llama.cpp reads for qwen2 and llama models: byte-level BPE (`gpt2`) and SentencePiece BPE with byte fallback
(`llama`). A pre-tokenizer that llama.cpp is not known to implement is an error, because the model would see
other tokens than it was tuned on.
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
    """Return the tokenizer keys of a GGUF file, without the prefix `tokenizer.ggml.` and the chat template.

    Args:
        folder: contains tokenizer.json.
        vocab_size: number of embedding rows; unused ids become `[PADi]` tokens.
        generation_config: its end tokens become eos and eot.
        chat_template: the template that the model was tuned with; if it does not write BOS, llama.cpp must
            not add it.

    Raises:
        FishError: the tokenizer is of another kind, or has more tokens than the model has embeddings.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FishError(f"{folder} has no tokenizer.json; download the model's tokenizer files.")
    stored = read_json(path)
    model = stored.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise FishError(f"{path} is not a BPE tokenizer, the only kind that can be written to GGUF; use --to-hf.")
    added = [token for token in stored.get("added_tokens", []) if isinstance(token, dict)]
    tokens, types = _tokens(model["vocab"], added, model.get("unk_token"), vocab_size, path)
    keys: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if model.get("byte_fallback"):
        keys |= {"model": "llama", "pre": "default", "scores": _scores(model, tokens, types)}
        keys["add_space_prefix"] = '"Prepend"' in _compact_json(
            stored.get("normalizer")
        ) or '"prepend_scheme":"first"' in (_compact_json(stored.get("pre_tokenizer")))
    else:
        keys |= {"model": "gpt2", "pre": _pre_tokenizer(stored, path), "merges": _merges(model)}
        if not keys["merges"]:
            raise FishError(f"{path} has no merges, which llama.cpp needs for a BPE vocabulary; use --to-hf.")
    keys |= _special_ids(path, tokens, generation_config)
    if keys["add_bos_token"] and chat_template is not None:
        bos = tokens[keys["bos_token_id"]]
        keys["add_bos_token"] = "bos_token" in chat_template or bos in chat_template
    return keys


def _tokens(
    vocab: dict[str, int], added: list[dict[str, Any]], unknown: Any, vocab_size: int, path: Path
) -> tuple[list[str], list[int]]:
    """Return the token strings and token types of all `vocab_size` ids."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    added_types = {token["content"]: _CONTROL if token.get("special") else _USER_DEFINED for token in added}
    for token, index in [*vocab.items(), *((token["content"], token["id"]) for token in added)]:
        if not 0 <= index < vocab_size:
            raise FishError(
                f"{path} has the token {token!r} with id {index}, but the model has {vocab_size} embeddings; "
                "use the tokenizer that belongs to the model."
            )
        tokens[index] = token
        types[index] = added_types.get(token, _BYTE if _BYTE_TOKEN.fullmatch(token) else _NORMAL)
        if token == unknown and token not in added_types:
            types[index] = _UNKNOWN
    return tokens, types


def _merges(model: dict[str, Any]) -> list[str]:
    """Return the BPE merges in the older form, `left right`."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]


def _scores(model: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """Return SentencePiece scores: the negative rank of the first merge that produces each token.

    SentencePiece merges the pair whose result has the highest score, so these scores reproduce the order of
    the merges.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.get("merges", [])):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    last_rank = len(ranks)
    return [
        -float(ranks.get(token, last_rank)) if kind == _NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def _pre_tokenizer(stored: dict[str, Any], path: Path) -> str:
    """Return llama.cpp's name for this tokenizer's pre-tokenizer, the rule that splits text before the merges.

    Raises:
        FishError: llama.cpp is not known to implement it.
    """
    parts = stored.get("pre_tokenizer") or {}
    steps = parts.get("pretokenizers", [parts]) if parts.get("type") == "Sequence" else [parts]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    pattern = patterns[0] if len(patterns) == 1 else None
    is_plain = byte_level and not byte_level[0].get("add_prefix_space", True)
    if is_plain and not patterns and byte_level[0].get("use_regex", True):
        return "gpt-2"
    for name, known_pattern in PRE_TOKENIZERS.items():
        if is_plain and pattern is not None and pattern == known_pattern:
            return name
    raise FishError(
        f"{path} has a pre-tokenizer that llama.cpp is not known to support; expected that of one of "
        f"{', '.join(PRE_TOKENIZERS)}; use --to-hf."
    )


def _special_ids(path: Path, tokens: list[str], generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the special tokens, and whether llama.cpp must add BOS and EOS."""
    from tokenizers import Tokenizer

    settings_path = path.with_name("tokenizer_config.json")
    settings = read_json(settings_path) if settings_path.is_file() else {}
    ids = {token: index for index, token in enumerate(tokens)}

    def id_of(key: str) -> int | None:
        value = settings.get(key)
        token = value.get("content") if isinstance(value, dict) else value
        return ids.get(token) if isinstance(token, str) else None

    ends = generation_config.get("eos_token_id")
    ends = [end for end in (ends if isinstance(ends, list) else [ends, id_of("eos_token")]) if isinstance(end, int)]
    bos = id_of("bos_token") if id_of("bos_token") is not None else generation_config.get("bos_token_id")
    pad = id_of("pad_token") if id_of("pad_token") is not None else generation_config.get("pad_token_id")
    special_ids = {
        "bos_token_id": bos,
        "eos_token_id": ends[0] if ends else None,
        "eot_token_id": ends[1] if len(ends) > 1 else None,
        "padding_token_id": pad,
        "unknown_token_id": id_of("unk_token"),
    }
    encoded = Tokenizer.from_file(str(path)).encode("a").ids
    keys: dict[str, Any] = {key: value for key, value in special_ids.items() if value is not None}
    return keys | {"add_bos_token": bool(encoded) and encoded[0] == bos, "add_eos_token": False}


def _compact_json(value: Any) -> str:
    import json

    return json.dumps(value, separators=(",", ":"))
