"""Load a model folder with transformers, and choose a device and a dtype that are fast on this machine."""

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
    """Return CUDA if available, else Apple's Metal, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(stored: str, device: torch.device) -> torch.dtype:
    """Return bfloat16 if the weights are stored in it and the GPU supports it natively, else float32.

    A CPU multiplies half precision far slower than float32. float16 gradients underflow without loss scaling, which
    the MLX backend does not have either, so float16 weights are widened.

    Args:
        stored: dtype of the stored weights, such as `bfloat16`.
        device: device of the model.
    """
    if stored != "bfloat16" or device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return torch.bfloat16


def load_model(folder: ModelFolder, device: torch.device) -> nn.Module:
    """Load the frozen base model on `device`.

    Raises:
        FishError: the weights are quantised, or do not match config.json.
    """
    _check_unquantized(folder)
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
        raise FishError(
            f"the weights in {folder.path} do not match its config.json ({error}); download the model again."
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would initialise them randomly
        raise FishError(f"{folder.path} has no {missing[0]}, which its config.json requires; download the model again.")
    model.eval()
    freeze(model)
    loaded: nn.Module = model.to(device)
    return loaded


def _check_unquantized(folder: ModelFolder) -> None:
    if folder.quantization:
        source = folder.record.get("source")
        original = f"--model {source}" if source else "the model that was converted"
        raise FishError(
            f"{folder.path} was quantised by MLX, in a format that torch cannot read; use the original model "
            f"({original}) or --backend mlx."
        )
    if "quantization_config" in folder.config:
        raise FishError(
            f"{folder.name} has quantised weights, which the torch backend cannot read; use the unquantised model."
        )


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Disable transformers' progress bar, which appears even for a model that loads at once."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
