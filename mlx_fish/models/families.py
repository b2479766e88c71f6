"""The supported model families, and everything the package needs to know about each architecture.

A family is listed only if tests compare its loss, gradients, generation, merging and every export with
transformers and with the reader of each export format. All other architectures are rejected.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_fish.errors import FishError


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: `model_type` in config.json, which is also the architecture name in a GGUF file.
        architecture: the transformers class.
        qkv_bias: whether the q, k and v projections always have a bias.
        has_head_dim: whether `head_dim` may differ from hidden_size / num_attention_heads.
        config_keys: entries of config.json that GGUF metadata does not store.
        gguf_rotary_pairs: whether llama.cpp reorders the rows of q and k for rotary pairs (0, 1); Hugging
            Face pairs (0, n/2).
    """

    model_type: str
    architecture: str
    qkv_bias: bool
    has_head_dim: bool
    config_keys: Mapping[str, Any]
    gguf_rotary_pairs: bool


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            qkv_bias=False,
            has_head_dim=True,
            config_keys={"mlp_bias": False},
            gguf_rotary_pairs=True,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            qkv_bias=True,
            has_head_dim=False,
            config_keys={"use_sliding_window": False},
            gguf_rotary_pairs=False,
        ),
    )
}
NAMES = " and ".join(sorted(FAMILIES, reverse=True))


def family_of(config: Mapping[str, Any], name: str) -> Family:
    """Return the family of a model.

    Args:
        config: the model's config.json.
        name: the model's name, for the error message.

    Raises:
        FishError: the family is not supported.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise FishError(f"{name} is a {model_type} model; mlx-fish supports only {NAMES} models.")
    return family
