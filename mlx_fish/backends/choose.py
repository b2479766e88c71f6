"""Choose a backend, mlx or torch, and load a model with it. Imports a framework only when a model is loaded."""

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
INSTALL = {"mlx": 'pip install "mlx-fish[mlx]"', "torch": 'pip install "mlx-fish[torch]"'}


def choose_backend(name: str = "auto") -> str:
    """The framework to compute with, `mlx` or `torch`. Looks for packages, and imports none.

    To be called before anything imports transformers, which imports mlx when it is installed: MLX wants OpenBLAS to be there
    first. torch does not want it at all: it would multiply with OpenBLAS too, whose threads and torch's own then wait for each
    other (measured on two cores: steps of 0.05 s became 0.1 to 1.8 s).

    Args:
        name: what was asked for. `auto` is what MLX_FISH_BACKEND says, else MLX on Apple silicon and torch elsewhere, else the
            other one.

    Raises:
        FishError: no such backend, or it is not installed.
    """
    chosen = _choose(name)
    if chosen == "mlx":
        load_openblas()
    return chosen


def _choose(name: str) -> str:
    asked = "--backend"
    if name == "auto":
        asked, name = VARIABLE, os.environ.get(VARIABLE) or "auto"
    if name not in BACKENDS:
        raise FishError(f"{asked} {name}: expected one of {', '.join(BACKENDS)}.{did_you_mean(name, BACKENDS)}")
    if name != "auto":
        if not _installed(name):
            raise FishError(f"{asked} {name}: {name} is not installed; run `{INSTALL[name]}`.")
        return name
    on_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    for candidate in ("mlx", "torch") if on_apple_silicon else ("torch", "mlx"):
        if _installed(candidate):
            return candidate
    wanted = "mlx" if on_apple_silicon else "torch"
    raise FishError(f"neither MLX nor torch with PEFT is installed; run `{INSTALL[wanted]}`.")


def load_backend(
    folder: ModelFolder, notice: Callable[[str], None] = lambda text: None, *, name: str = "auto"
) -> Backend:
    """Load the model.

    Args:
        notice: takes a sentence for the person when something is not as fast or as exact as it could be.
        name: see `choose_backend`.

    Raises:
        FishError: also when the model is of an architecture that was not tested.
    """
    chosen = choose_backend(name)
    family_of(folder.config, folder.name)
    if chosen == "torch":
        from mlx_fish.backends.torch import TorchBackend

        return TorchBackend(folder)
    from mlx_fish.backends.mlx import MlxBackend

    return MlxBackend(folder, notice)


def load_quantizer(bits: int, group_size: int) -> Quantizer:
    """What packs matrices into `bits` bits, `group_size` weights a scale.

    Raises:
        FishError: no such quantisation, or MLX is not installed.
    """
    if bits not in BITS:
        raise FishError(f"-q {bits}: 4 or 8 bits were expected.")
    if group_size not in GROUP_SIZES:
        raise FishError(f"--group-size {group_size}: {', '.join(map(str, GROUP_SIZES))} was expected.")
    try:
        from mlx_fish.backends.mlx.quantize import MlxQuantizer
    except ImportError as error:
        raise FishError(
            f"quantising needs MLX ({error}); install it with `pip install 'mlx-fish[mlx]'`, or leave -q out."
        ) from error
    return MlxQuantizer(bits, group_size)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a framework failed for want of memory, where it can say so.

    Metal raises for one buffer that is too large or for too many of them; when the GPU runs out in the middle of its work the
    process ends without a word.
    """
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(said in words for said in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("out of memory", "unable to allocate", "[metal::malloc]")


def _installed(backend: str) -> bool:
    # Found, not imported: OpenBLAS must be loaded before MLX is.
    return all(importlib.util.find_spec(package) is not None for package in PACKAGES[backend])
