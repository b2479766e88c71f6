"""Load a model folder as an mlx-lm model, in a dtype that is fast on this machine."""

from collections.abc import Callable

import mlx_fish.backends.mlx.runtime as runtime  # isort: skip
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load_model as load_mlx_lm_model

from mlx_fish.backends.blas import SLOW_BLAS_NOTICE
from mlx_fish.backends.mlx.activations import SwiGluMlp
from mlx_fish.backends.mlx.attention import Attention
from mlx_fish.errors import FishError
from mlx_fish.models.folder import ModelFolder


def load_model(folder: ModelFolder, notice: Callable[[str], None]) -> tuple[nn.Module, mx.Dtype]:
    """Load the frozen base model.

    On a CPU half-precision weights are widened to float32, since MLX multiplies them about 40 times slower there.

    Args:
        folder: the model folder.
        notice: called with a message for the user if OpenBLAS is missing.

    Returns:
        the model, and the dtype of its activations.

    Raises:
        FishError: the weights do not match config.json.
    """
    assert folder.weights  # reading the property validates every file with safetensors before MLX maps it
    if not runtime.has_fast_blas:
        notice(SLOW_BLAS_NOTICE)
    try:
        model, _ = load_mlx_lm_model(folder.path, lazy=True, model_config=folder.config)
    except (ValueError, KeyError, TypeError) as error:
        raise FishError(
            f"the weights in {folder.path} do not match its config.json ({error}); download the model again."
        ) from error
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
        mx.eval(array)  # one by one, so that memory never holds two copies of the model
    mx.clear_cache()
    model.freeze()
    return model, _activation_dtype(model)


def _activation_dtype(model: nn.Module) -> mx.Dtype:
    return model.model.norm.weight.dtype
