"""Prepare the process for `import mlx.core`, and detect the device.

Every module of this package imports mlx after this module, so that OpenBLAS is loaded first.
"""

import resource

from mlx_fish.backends.blas import load_openblas

has_fast_blas = load_openblas()
_open_files = resource.getrlimit(resource.RLIMIT_NOFILE)

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402, F401

if resource.getrlimit(resource.RLIMIT_NOFILE)[1] == _open_files[1]:
    resource.setrlimit(resource.RLIMIT_NOFILE, _open_files)  # importing mlx-lm changes it for the whole process

on_gpu = mx.default_device().type == mx.DeviceType.gpu
on_metal = on_gpu and mx.metal.is_available()
