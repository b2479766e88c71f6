"""The tokenizer inside a GGUF file, written as Hugging Face's tokenizer.json.

Built with the `tokenizers` library alone: transformers can do this too, but only where torch is installed. Knows the two
kinds that qwen2 and llama models use: byte-level BPE (`gpt2`) and SentencePiece BPE with byte fallback (`llama`).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fish.errors import FishError
from mlx_fish.storage.files import write_json, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # tokenizer.ggml.token_type
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
# tokenizer.ggml.pre -> how text is cut before the merges; None: GPT-2's own rule.
PRE_TOKENIZERS = {
    "qwen2": _CONTRACTIONS + r"\p{N}" + _TAIL,
    "deepseek-r1-qwen": _CONTRACTIONS + r"\p{N}" + _TAIL,
    **dict.fromkeys(_LLAMA3, _CONTRACTIONS + r"\p{N}{1,3}" + _TAIL),
    "gpt-2": None,
    "default": None,
}
_SPACE = "\u2581"  # SentencePiece's visible space


def write_tokenizer(metadata: dict[str, Any], folder: Path, *, source: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template (in both places) into `folder`.

    Args:
        metadata: the GGUF file's.
        source: the GGUF file, for messages.

    Raises:
        FishError: no tokenizer, or one of a kind that is not known here.
    """
    tokens = _tokens(metadata, source)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, source)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, source)
    else:
        raise FishError(f"{source} holds a tokenizer of the kind {kind}; gpt2 or llama was expected.")
    special = _special_tokens(metadata, tokens)
    _add_marked_tokens(tokenizer, metadata, tokens)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")) and "bos_token" in special
    if add_bos:
        _begin_with(tokenizer, special["bos_token"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer" if _pre(metadata) == "qwen2" else "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        write_text(folder / "chat_template.jinja", template)
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)


def _tokens(metadata: dict[str, Any], source: Path) -> list[str]:
    """The vocabulary without the unused entries that llama.cpp's converter pads it with."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise FishError(f"{source} has no tokenizer (tokenizer.ggml.tokens); use a GGUF with its vocabulary.")
    end = len(tokens)
    while 0 < end <= len(kinds) and kinds[end - 1] == _UNUSED:
        end -= 1
    return tokens[:end]


def _pre(metadata: dict[str, Any]) -> Any:
    return metadata.get("tokenizer.ggml.pre", "default")


def _byte_level(metadata: dict[str, Any], tokens: list[str], source: Path) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    pre = _pre(metadata)
    if pre not in PRE_TOKENIZERS:
        raise FishError(f"{source} cuts text by the rule {pre}; mlx-fish knows {', '.join(PRE_TOKENIZERS)}.")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    split = PRE_TOKENIZERS[pre]
    try:
        # Llama 3 looks whole words up before it merges; the others' words are all reachable by merges.
        model = BPE(vocab=_ids(tokens), merges=merges, fuse_unk=False, ignore_merges=pre in _LLAMA3)
    except Exception as error:  # the library raises plain Exceptions
        raise FishError(f"{source} holds a vocabulary and merges that do not fit ({error}); fetch it again.") from error
    tokenizer = Tokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], source: Path) -> "Tokenizer":
    """SentencePiece BPE: merges are not stored, but follow from the scores of the pieces.

    The leading space goes before every piece of text between special tokens, as in llama.cpp.
    """
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) < len(tokens):
        raise FishError(f"{source} has a SentencePiece vocabulary without scores; fetch it again.")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    unknown_token = tokens[unknown] if isinstance(unknown, int) and unknown < len(tokens) else None
    ids = _ids(tokens)
    merges = _merges_from_scores(ids, dict(zip(tokens, scores, strict=False)))
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return tokenizer


def _merges_from_scores(ids: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every cut of a piece into two pieces, best piece first."""
    found = []
    for piece in ids:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                found.append((-scores[piece], ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _special_tokens(metadata: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and i < len(tokens)}


def _add_marked_tokens(tokenizer: "Tokenizer", metadata: dict[str, Any], tokens: list[str]) -> None:
    """Tokens that stay whole wherever they stand: control tokens, and those the user defined."""
    from tokenizers import AddedToken

    kinds = metadata.get("tokenizer.ggml.token_type", [])
    marked = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(marked)


def _begin_with(tokenizer: "Tokenizer", bos: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
