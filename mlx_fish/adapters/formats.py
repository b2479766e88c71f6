"""Adapters of other trainers: what their configs ask for, what of it is refused and why, and mlx-lm's layout.

PEFT's format is ours (`adapter.py`). The tensors say which layers are adapted and by which rank, so `target_modules` in
any form (a list, a regex, `all-linear`), `rank_pattern` and `layers_to_transform` need no interpretation; the scale does.
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

# Fields of PEFT's LoraConfig that do not change what the stored tensors mean.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora", "runtime_config"),
    *("megatron_core", "eva_config", "qalora_group_size", "velora_config", "lora_ga_config", "megatron_config"),
}
_REFUSED = {
    "modules_to_save": "whole layers were trained beside LoRA",
    "trainable_token_indices": "new token embeddings were trained beside LoRA",
    "fan_in_fan_out": "its weights are stored transposed, as in GPT-2",
    "lora_bias": "its B has a bias",
    "alora_invocation_tokens": "it is active only after certain tokens",
    "use_qalora": "it averages the input over groups",
    "layer_replication": "it repeats the base's layers",
    "target_parameters": "it adapts expert parameters that are no linear layers",
    "use_bdlora": "its matrices are block-diagonal",
    "arrow_config": "it routes between several adapters",
    "kasa_config": "it changes the base's weights by a singular value decomposition",
    "corda_config": "CorDA changes the base's weights before training",
    "monteclora_config": "it samples its matrices",
    "ensure_weight_tying": "it adapts the tied embedding",
}
# Starts that take a part out of the base's weights, so that the adapter does not fit the base as it is published.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_peft(folder: Path, config: dict[str, Any]) -> None:
    """Refuse, with the reason, an adapter that would be computed wrongly."""
    path = folder / CONFIG_FILE
    if config.get("peft_type") != "LORA":
        raise FishError(f"{folder} holds a {config.get('peft_type')} adapter; LORA was expected.")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise FishError(
                f"{path} sets {key}: {reason}, which mlx-fish does not compute; merge it with PEFT instead."
            )
    if config.get("bias", "none") != "none":
        raise FishError(f"{path} sets bias: biases were trained beside LoRA, which mlx-fish does not compute.")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise FishError(
            f"{path} was started by {start}, which also changed the base's weights; save it anew with PEFT's "
            "`path_initial_model_for_weight_conversion` to make plain LoRA of it."
        )
    known = {*_HARMLESS, *_REFUSED, "bias", "init_lora_weights", "loftq_config"}
    if unknown := sorted(key for key, value in config.items() if key not in known and value):
        raise FishError(f"{path} sets {', '.join(unknown)}, which mlx-fish does not know and might compute wrongly.")


def peft_scale(config: dict[str, Any], module: str, rank: int) -> float:
    """The factor on B A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732), alpha by PEFT's pattern rule."""
    alpha = _number("lora_alpha", config.get("lora_alpha", _DEFAULT_ALPHA))
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise FishError(f"{CONFIG_FILE}: `alpha_pattern` should be an object of layer names and numbers.")
    for pattern, value in patterns.items():
        if not re.fullmatch(r"\^?([\w.]|\\\.)+\$?", pattern):  # one with repeats could be made to match for ever
            raise FishError(f"{CONFIG_FILE}: `alpha_pattern` has {pattern!r}, where the name of a layer was expected.")
        if re.fullmatch(rf"(.*\.)?({pattern})", module):  # PEFT's matching rule
            alpha = _number("alpha_pattern", value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def peft_dropout(config: dict[str, Any]) -> float:
    return _number("lora_dropout", config.get("lora_dropout") or 0)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise FishError(f"{CONFIG_FILE}: `{key}` is {str(value)[:40]!r}, where a number was expected.")
    return float(value)


def is_mlx_lm(folder: Path) -> bool:
    return (folder / MLX_LM_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def read_mlx_lm(folder: Path) -> tuple[dict[str, Any], dict[str, Float32]]:
    """An adapter in mlx-lm's layout -> (a PEFT config, tensors under PEFT's keys).

    mlx-lm keeps lora_a as (in, r) and lora_b as (r, out), both transposed here, and a scale in place of alpha.
    """
    found = read_json(folder / CONFIG_FILE)
    kind, parameters = found.get("fine_tune_type", "lora"), found.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(parameters, dict) or "scale" not in parameters:
        raise FishError(f"{folder} holds mlx-lm training of the kind {kind}; lora or dora with its scale was expected.")
    weights = Weights(read_header(folder / MLX_LM_FILE)[0])
    arrays: dict[str, Float32] = {}
    ranks = set()
    for name in weights:
        module, _, part = name.rpartition(".")
        key = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}.get(part)
        array = weights.read(name)
        if key is None or array.ndim != (1 if part == "m" else 2):
            raise FishError(f"{folder / MLX_LM_FILE} holds {name}, which is not LoRA on a linear layer.")
        arrays[f"base_model.model.{module}.{key}"] = np.ascontiguousarray(array.T)
        ranks |= {array.shape[1]} if part == "lora_a" else set()
    if len(ranks) != 1:
        raise FishError(f"{folder / MLX_LM_FILE} has matrices of the ranks {sorted(ranks)}; mlx-lm knows one.")
    rank = ranks.pop()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": float(parameters["scale"]) * rank,
        "lora_dropout": float(parameters.get("dropout") or 0),
        "use_dora": kind == "dora",
        "base_model_name_or_path": found.get("model"),
    }
    return config, arrays
