"""Give MLX's Linux wheel a fast BLAS. Imports no framework: it must run before whatever imports mlx, transformers included."""

import ctypes
import ctypes.util
import sys

MISSING = (
    "OpenBLAS was not found, so matrix products on this CPU run about 35 times slower than they could; "
    "install it (Debian, Ubuntu: apt-get install libopenblas0-pthread)."
)


def load_openblas() -> bool:
    """Load OpenBLAS with global symbols: the wheel links the reference BLAS, and takes what was loaded globally before it.

    Returns:
        False when the products will be slow, which a person should be told.
    """
    if sys.platform != "linux":
        return True  # macOS has Accelerate and Metal
    for name in ("libopenblas.so.0", ctypes.util.find_library("openblas")):
        if name:
            try:
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
                return True
            except OSError:
                continue
    return False
