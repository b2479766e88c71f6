"""The table of model families: what the rest of the package needs to know about each architecture, and nowhere else.

A family is in the table when tests have compared its loss, gradients, generation, merging and every export with transformers
and with each export's own reader. Anything else is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_fish.errors import FishError


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: its name in config.json, which is also that of the architecture in a GGUF file.
        architecture: transformers' class.
        qkv_bias: q, k and v always have a bias.
        has_head_dim: the width of a head may differ from hidden_size / num_attention_heads.
        config_keys: keys of config.json that a GGUF file has no place for.
        gguf_rotary_pairs: llama.cpp stores the rows of q and k for rotary pairs (0, 1), Hugging Face for (0, n/2).
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
    """The family of a model.

    Args:
        config: its config.json.
        name: what the message calls it.

    Raises:
        FishError: a family that is not in the table.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise FishError(f"{name} is a {model_type} model; mlx-fish trains {NAMES} models.")
    return family
