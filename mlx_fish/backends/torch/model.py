"""Load a model folder with transformers, on the device and in the dtype that this machine computes well."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn as nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from mlx_fish.backends.torch.products import freeze
from mlx_fish.errors import FishError
from mlx_fish.models.folder import ModelFolder


def choose_device() -> torch.device:
    """CUDA, else Apple's Metal, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(stored: str, device: torch.device) -> torch.dtype:
    """bfloat16 where it is stored and the GPU computes it; float32 otherwise.

    A CPU multiplies half precision far slower than float32. float16 gradients underflow without a loss scale, which the MLX
    side does not have either, so float16 weights are widened.
    """
    if stored != "bfloat16" or device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return torch.bfloat16


def load_model(folder: ModelFolder, device: torch.device) -> nn.Module:
    """The frozen base model.

    Raises:
        FishError: the weights are quantised, or do not fit the config.
    """
    _refuse_quantized(folder)
    dtype = choose_dtype(folder.weights.dtype, device)
    try:
        with _no_progress_bar():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder.path,
                config=AutoConfig.for_model(**folder.config),
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FishError(f"{folder.path} does not fit its config.json ({error}); fetch it again.") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random values
        raise FishError(f"{folder.path} has no {missing[0]}, which its config.json asks for; fetch it again.")
    model.eval()
    freeze(model)
    loaded: nn.Module = model.to(device)
    return loaded


def _refuse_quantized(folder: ModelFolder) -> None:
    if folder.quantization:
        source = folder.record.get("source")
        original = f"--model {source}" if source else "the model that it was made from"
        raise FishError(
            f"{folder.path} was quantised by MLX, which torch does not read; give its original ({original}), "
            "or compute with --backend mlx."
        )
    if "quantization_config" in folder.config:
        raise FishError(f"{folder.name} holds quantised weights, which are not read; give the unquantised model.")


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar even for a model that loads in a blink."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
