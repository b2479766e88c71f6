"""Load a model folder into an mlx-lm model, in a dtype that this machine computes fast."""

from collections.abc import Callable

import mlx_fish.backends.mlx.runtime as runtime  # isort: skip
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load_model as load_mlx_lm_model

from mlx_fish.backends.blas import MISSING
from mlx_fish.backends.mlx.activations import SwiGluMlp
from mlx_fish.backends.mlx.attention import Attention
from mlx_fish.errors import FishError
from mlx_fish.models.folder import ModelFolder


def load_model(folder: ModelFolder, notice: Callable[[str], None]) -> tuple[nn.Module, mx.Dtype]:
    """The frozen base model and the dtype of its activations.

    On a CPU half-precision weights are widened to float32, since MLX multiplies them some 40 times slower there.
    """
    assert folder.weights  # opening them checks every file with the safetensors library before MLX maps it
    if not runtime.has_fast_blas:
        notice(MISSING)
    try:
        model, _ = load_mlx_lm_model(folder.path, lazy=True, model_config=folder.config)
    except (ValueError, KeyError, TypeError) as error:
        raise FishError(f"{folder.path} does not fit its config.json ({error}); fetch it again.") from error
    if not runtime.on_gpu:
        model.update(
            tree_map(
                lambda array: array.astype(mx.float32) if array.dtype in (mx.bfloat16, mx.float16) else array,
                model.parameters(),
            )
        )
    for block in model.model.layers:
        block.self_attn, block.mlp = Attention(block.self_attn), SwiGluMlp(block.mlp)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one by one, so that two copies of a model are never held at once
    mx.clear_cache()
    model.freeze()
    return model, _activation_dtype(model)


def _activation_dtype(model: nn.Module) -> mx.Dtype:
    return model.model.norm.weight.dtype
