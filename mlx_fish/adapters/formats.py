"""Read adapters of other trainers: check PEFT configs for unsupported features, compute scales, read mlx-lm's layout.

mlx-fish's own format is PEFT's (`peft.py`). The stored tensors determine the adapted layers and their ranks, so
`target_modules` in any form (a list, a regex, `all-linear`), `rank_pattern` and `layers_to_transform` need no
interpretation. Only the scale depends on the config.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fish.errors import FishError
from mlx_fish.storage.files import read_json
from mlx_fish.storage.tensors import Float32, Weights, read_header

CONFIG_FILE = "adapter_config.json"
MLX_LM_FILE = "adapters.safetensors"
_DEFAULT_ALPHA = 8.0  # PEFT's

# Fields of PEFT's LoraConfig that are handled, or that do not change the meaning of the stored tensors.
_SUPPORTED_FIELDS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora", "runtime_config"),
    *("megatron_core", "eva_config", "qalora_group_size", "velora_config", "lora_ga_config", "megatron_config"),
}
# Fields that change the computation in ways that mlx-fish does not support, and why.
_UNSUPPORTED_FIELDS = {
    "modules_to_save": "full layers were trained in addition to LoRA",
    "trainable_token_indices": "token embeddings were trained in addition to LoRA",
    "fan_in_fan_out": "the weights are stored transposed, as in GPT-2",
    "lora_bias": "B has a bias",
    "alora_invocation_tokens": "the adapter is active only after certain tokens",
    "use_qalora": "the adapter averages its input over groups",
    "layer_replication": "the adapter repeats layers of the base",
    "target_parameters": "the adapter changes expert parameters, which are not linear layers",
    "use_bdlora": "the matrices are block-diagonal",
    "arrow_config": "the adapter routes between several adapters",
    "kasa_config": "the adapter changes the base's weights by a singular value decomposition",
    "corda_config": "CorDA changes the base's weights before training",
    "monteclora_config": "the adapter samples its matrices",
    "ensure_weight_tying": "the adapter changes the tied embedding",
}
# Initialisations that subtract a part of the base's weights, so that the adapter does not fit the published base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_peft(folder: Path, config: dict[str, Any]) -> None:
    """Check that mlx-fish supports every feature that a PEFT adapter's config uses.

    Raises:
        FishError: the adapter would be computed wrongly; the message has the reason.
    """
    path = folder / CONFIG_FILE
    if config.get("peft_type") != "LORA":
        raise FishError(f"{folder} has an adapter of type {config.get('peft_type')}, but only LORA is supported.")
    for key, reason in _UNSUPPORTED_FIELDS.items():
        if config.get(key):
            raise FishError(
                f"{path} sets {key}: {reason}, which mlx-fish does not support; merge the adapter with PEFT instead."
            )
    if config.get("bias", "none") != "none":
        raise FishError(
            f"{path} sets bias: biases were trained in addition to LoRA, which mlx-fish does not support; "
            "merge the adapter with PEFT instead."
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise FishError(
            f"{path} was initialised with {init}, which also changed the base's weights; convert it to plain LoRA "
            "by saving it with PEFT's `path_initial_model_for_weight_conversion`."
        )
    known = {*_SUPPORTED_FIELDS, *_UNSUPPORTED_FIELDS, "bias", "init_lora_weights", "loftq_config"}
    if unknown := sorted(key for key, value in config.items() if key not in known and value):
        raise FishError(
            f"{path} sets {', '.join(unknown)}, which mlx-fish does not know and might compute wrongly; "
            "merge the adapter with PEFT instead."
        )


def peft_scale(config: dict[str, Any], module: str, rank: int) -> float:
    """Return the factor on B A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732).

    Alpha is `lora_alpha`, or the value of the first matching pattern in `alpha_pattern`, by PEFT's rule.

    Args:
        config: adapter_config.json.
        module: module path of the layer.
        rank: r.

    Raises:
        FishError: the config's alpha values are invalid.
    """
    alpha = _checked_float("lora_alpha", config.get("lora_alpha", _DEFAULT_ALPHA))
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise FishError(f"{CONFIG_FILE}: `alpha_pattern` must be an object that maps layer names to numbers.")
    for pattern, value in patterns.items():
        if not re.fullmatch(r"\^?([\w.]|\\\.)+\$?", pattern):  # a crafted pattern with repeats could match forever
            raise FishError(f"{CONFIG_FILE}: `alpha_pattern` has the key {pattern!r}, but a layer name was expected.")
        if re.fullmatch(rf"(.*\.)?({pattern})", module):  # PEFT's matching rule
            alpha = _checked_float("alpha_pattern", value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def peft_dropout(config: dict[str, Any]) -> float:
    """Return the dropout probability of a PEFT config."""
    return _checked_float("lora_dropout", config.get("lora_dropout") or 0)


def _checked_float(key: str, value: Any) -> float:
    """Return the value of a config field as a float. Raise FishError if it is not a number below 1e9."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise FishError(f"{CONFIG_FILE}: `{key}` is {str(value)[:40]!r}, but a number was expected.")
    return float(value)


def is_mlx_lm(folder: Path) -> bool:
    """Return whether a folder has an adapter in mlx-lm's layout."""
    return (folder / MLX_LM_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def read_mlx_lm(folder: Path) -> tuple[dict[str, Any], dict[str, Float32]]:
    """Read an adapter in mlx-lm's layout and convert it to PEFT's.

    mlx-lm stores lora_a as (in, r) and lora_b as (r, out), which are transposed here, and a scale instead of alpha.

    Returns:
        a PEFT config, and float32 tensors under PEFT's keys.

    Raises:
        FishError: the folder does not have LoRA or DoRA on linear layers with one common rank.
    """
    stored = read_json(folder / CONFIG_FILE)
    kind, parameters = stored.get("fine_tune_type", "lora"), stored.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(parameters, dict) or "scale" not in parameters:
        raise FishError(
            f"{folder} has an mlx-lm adapter of type {kind}, but lora or dora with lora_parameters and their scale was "
            "expected."
        )
    weights = Weights(read_header(folder / MLX_LM_FILE)[0])
    arrays: dict[str, Float32] = {}
    ranks = set()
    for name in weights:
        module, _, suffix = name.rpartition(".")
        key = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}.get(suffix)
        array = weights.read(name)
        if key is None or array.ndim != (1 if suffix == "m" else 2):
            raise FishError(f"{folder / MLX_LM_FILE} has the tensor {name}, which is not LoRA on a linear layer.")
        arrays[f"base_model.model.{module}.{key}"] = np.ascontiguousarray(array.T)
        ranks |= {array.shape[1]} if suffix == "lora_a" else set()
    if len(ranks) != 1:
        raise FishError(
            f"{folder / MLX_LM_FILE} has matrices of ranks {sorted(ranks)}, but one rank for all layers was expected."
        )
    rank = ranks.pop()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": float(parameters["scale"]) * rank,
        "lora_dropout": float(parameters.get("dropout") or 0),
        "use_dora": kind == "dora",
        "base_model_name_or_path": stored.get("model"),
    }
    return config, arrays
