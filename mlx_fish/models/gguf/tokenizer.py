"""Convert the tokenizer of a GGUF file to Hugging Face's tokenizer.json.

Uses only the `tokenizers` library; transformers can do this too, but only with torch installed. Supports the
two kinds that qwen2 and llama models use: byte-level BPE (`gpt2`) and SentencePiece BPE with byte fallback
(`llama`).
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
# tokenizer.ggml.pre -> regular expression that splits the text before BPE; None: GPT-2's own.
PRE_TOKENIZERS = {
    "qwen2": _CONTRACTIONS + r"\p{N}" + _TAIL,
    "deepseek-r1-qwen": _CONTRACTIONS + r"\p{N}" + _TAIL,
    **dict.fromkeys(_LLAMA3, _CONTRACTIONS + r"\p{N}{1,3}" + _TAIL),
    "gpt-2": None,
    "default": None,
}
_SPACE = "\u2581"  # SentencePiece's visible space


def write_tokenizer(metadata: dict[str, Any], folder: Path, *, source: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template to `folder`.

    The chat template is written to both tokenizer_config.json and chat_template.jinja.

    Args:
        metadata: the metadata of the GGUF file.
        source: the path of the GGUF file, for error messages.

    Raises:
        FishError: the file has no tokenizer, or one that is damaged or not supported.
    """
    tokens = _read_vocabulary(metadata, source)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, source)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, source)
    else:
        raise FishError(f"{source} has a tokenizer of the kind {kind}; gpt2 or llama was expected.")
    special_tokens = _special_tokens(metadata, tokens)
    _add_special_tokens(tokenizer, metadata, tokens)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")) and "bos_token" in special_tokens
    if add_bos:
        _prepend_bos(tokenizer, special_tokens["bos_token"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer" if _pre_tokenizer_name(metadata) == "qwen2" else "PreTrainedTokenizerFast",
        **special_tokens,
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        write_text(folder / "chat_template.jinja", template)
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)


def _read_vocabulary(metadata: dict[str, Any], source: Path) -> list[str]:
    """Return the tokens in id order, without the unused entries that llama.cpp's converter pads with."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    token_types = metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise FishError(f"{source} has no tokenizer (tokenizer.ggml.tokens); use a GGUF file with a vocabulary.")
    end = len(tokens)
    while 0 < end <= len(token_types) and token_types[end - 1] == _UNUSED:
        end -= 1
    return tokens[:end]


def _pre_tokenizer_name(metadata: dict[str, Any]) -> Any:
    return metadata.get("tokenizer.ggml.pre", "default")


def _byte_level(metadata: dict[str, Any], tokens: list[str], source: Path) -> "Tokenizer":
    """Build a byte-level BPE tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    pre_name = _pre_tokenizer_name(metadata)
    if pre_name not in PRE_TOKENIZERS:
        raise FishError(
            f"{source} uses the pre-tokenizer {pre_name}; mlx-fish supports only {', '.join(PRE_TOKENIZERS)}."
        )
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    pattern = PRE_TOKENIZERS[pre_name]
    try:
        # Llama 3 looks up whole words before applying merges; in the other vocabularies, merges produce every
        # word.
        model = BPE(vocab=_token_ids(tokens), merges=merges, fuse_unk=False, ignore_merges=pre_name in _LLAMA3)
    except Exception as error:  # the library raises plain Exceptions
        raise FishError(
            f"{source} has merges that do not match its vocabulary ({error}); download it again."
        ) from error
    tokenizer = Tokenizer(model)
    if pre_name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], source: Path) -> "Tokenizer":
    """Build a SentencePiece BPE tokenizer.

    GGUF stores no merges for it; they are derived from the scores of the pieces. As in llama.cpp, a leading
    space is added to every text segment between special tokens.
    """
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) < len(tokens):
        raise FishError(f"{source} has a SentencePiece vocabulary without scores; fetch it again.")
    unknown_id = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    unknown_token = tokens[unknown_id] if isinstance(unknown_id, int) and unknown_id < len(tokens) else None
    ids = _token_ids(tokens)
    merges = _merges_from_scores(ids, dict(zip(tokens, scores, strict=False)))
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True))
    add_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    prepend: list[Any] = [normalizers.Prepend(_SPACE)] if add_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    decoder_steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decoder_steps, decoders.Strip(" ", 1, 0)] if add_prefix else decoder_steps)
    return tokenizer


def _merges_from_scores(ids: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return all merges of two pieces into a third, ordered by the score of the result, best first."""
    merges = []
    for piece in ids:
        for split in range(1, len(piece)):
            left, right = piece[:split], piece[split:]
            if left in ids and right in ids:
                merges.append((-scores[piece], ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _token_ids(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _special_tokens(metadata: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    """Return the special tokens by their name in tokenizer_config.json, such as `bos_token`."""
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and i < len(tokens)}


def _add_special_tokens(tokenizer: "Tokenizer", metadata: dict[str, Any], tokens: list[str]) -> None:
    """Add control and user-defined tokens, which are never split."""
    from tokenizers import AddedToken

    token_types = metadata.get("tokenizer.ggml.token_type", [])
    added_tokens = [
        AddedToken(token, normalized=False, special=token_type == _CONTROL)
        for token, token_type in zip(tokens, token_types, strict=False)
        if token_type in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added_tokens)


def _prepend_bos(tokenizer: "Tokenizer", bos: str) -> None:
    """Make the tokenizer add BOS to every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
