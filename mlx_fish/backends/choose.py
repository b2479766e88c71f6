"""Choose a backend, MLX or torch, and load a model with it. Imports a framework only when a model is loaded."""

import importlib.util
import os
import platform
import sys
from collections.abc import Callable

from mlx_fish.backends.blas import load_openblas
from mlx_fish.backends.protocol import Backend
from mlx_fish.config import BACKENDS
from mlx_fish.errors import FishError, did_you_mean
from mlx_fish.models.convert import BITS, GROUP_SIZES, Quantizer
from mlx_fish.models.families import family_of
from mlx_fish.models.folder import ModelFolder

VARIABLE = "MLX_FISH_BACKEND"
PACKAGES = {"mlx": ("mlx", "mlx_lm"), "torch": ("torch", "peft")}
INSTALL_COMMANDS = {"mlx": 'pip install "mlx-fish[mlx]"', "torch": 'pip install "mlx-fish[torch]"'}


def choose_backend(name: str = "auto") -> str:
    """Return the backend to use, `mlx` or `torch`. Checks which packages are installed, and imports none of them.

    Call this before anything imports transformers, which imports mlx if it is installed: for MLX, OpenBLAS must be
    loaded first. For torch it must not be loaded at all: torch would multiply with OpenBLAS too, and OpenBLAS's
    threads and torch's own would wait for each other (measured on two cores: steps of 0.05 s became 0.1 to 1.8 s).

    Args:
        name: `mlx`, `torch` or `auto`. `auto` uses the environment variable MLX_FISH_BACKEND. If that is unset, it
            prefers MLX on Apple silicon and torch elsewhere, and falls back to whichever is installed.

    Raises:
        FishError: the backend is unknown or not installed.
    """
    chosen = _choose(name)
    if chosen == "mlx":
        load_openblas()
    return chosen


def _choose(name: str) -> str:
    setting = "--backend"
    if name == "auto":
        setting, name = VARIABLE, os.environ.get(VARIABLE) or "auto"
    if name not in BACKENDS:
        raise FishError(f"{setting} {name}: expected one of {', '.join(BACKENDS)}.{did_you_mean(name, BACKENDS)}")
    if name != "auto":
        if not _installed(name):
            raise FishError(f"{setting} {name}: {name} is not installed; run `{INSTALL_COMMANDS[name]}`.")
        return name
    on_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    for candidate in ("mlx", "torch") if on_apple_silicon else ("torch", "mlx"):
        if _installed(candidate):
            return candidate
    preferred = "mlx" if on_apple_silicon else "torch"
    raise FishError(f"neither MLX nor torch with PEFT is installed; run `{INSTALL_COMMANDS[preferred]}`.")


def load_backend(
    folder: ModelFolder, notice: Callable[[str], None] = lambda text: None, *, name: str = "auto"
) -> Backend:
    """Load a model folder into the chosen backend.

    Args:
        folder: the base model.
        notice: called with a message for the user if the setup limits speed or accuracy.
        name: see `choose_backend`.

    Raises:
        FishError: the backend is unknown or not installed, the architecture is untested, or the weights cannot
            be loaded.
    """
    chosen = choose_backend(name)
    family_of(folder.config, folder.name)
    if chosen == "torch":
        from mlx_fish.backends.torch import TorchBackend

        return TorchBackend(folder)
    from mlx_fish.backends.mlx import MlxBackend

    return MlxBackend(folder, notice)


def load_quantizer(bits: int, group_size: int) -> Quantizer:
    """Return a quantizer to `bits` bits per weight, with one scale for each group of `group_size` weights.

    Raises:
        FishError: the bits or the group size are not supported, or MLX is not installed.
    """
    if bits not in BITS:
        raise FishError(f"-q {bits}: expected 4 or 8 bits.")
    if group_size not in GROUP_SIZES:
        raise FishError(f"--group-size {group_size}: expected one of {', '.join(map(str, GROUP_SIZES))}.")
    try:
        from mlx_fish.backends.mlx.quantize import MlxQuantizer
    except ImportError as error:
        raise FishError(
            f"quantisation needs MLX, which cannot be imported ({error}); "
            "install it with `pip install 'mlx-fish[mlx]'`, or omit -q."
        ) from error
    return MlxQuantizer(bits, group_size)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an exception means that the framework ran out of memory.

    Not every such failure raises: Metal raises for one buffer that is too large, or for too many buffers; if the GPU
    runs out of memory during its work, the process ends without an error message.
    """
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in message for phrase in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("out of memory", "unable to allocate", "[metal::malloc]")


def _installed(backend: str) -> bool:
    # find_spec does not import the package: OpenBLAS must be loaded before MLX.
    return all(importlib.util.find_spec(package) is not None for package in PACKAGES[backend])
