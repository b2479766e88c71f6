"""What several tests share. OpenBLAS is loaded before anything imports mlx."""

import os
import signal
from pathlib import Path

import pytest

from mlx_fish.blas import load_openblas

load_openblas()

ROOT = Path(__file__).parent.parent

# A shell's background job ignores SIGINT, `nohup` SIGHUP, and so would every program that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny():
    """The built-in model's folder."""
    from mlx_fish.hub import find_model

    return find_model("tiny")


@pytest.fixture(scope="session")
def tokenizer(tiny):
    from mlx_fish.template import load_tokenizer

    return load_tokenizer(tiny)


@pytest.fixture(scope="session")
def real_model():
    """A real 0.5B model's folder, named by MLX_FISH_TEST_MODEL."""
    from mlx_fish.hub import find_model

    path = os.environ.get("MLX_FISH_TEST_MODEL")
    if not path:
        pytest.skip("MLX_FISH_TEST_MODEL names no model")
    return find_model(path)


@pytest.fixture(params=["qwen2", "llama"])
def pair(request, tmp_path):
    """A random model of each architecture, and an adapter on it."""
    from fuse_models import make_adapter, make_model

    base = make_model(tmp_path / "base", request.param, tied=request.param == "qwen2")
    return base, make_adapter(tmp_path / "adapter", base)


@pytest.fixture
def qwen(tmp_path):
    """A random tied qwen2 model, and an adapter on it."""
    from fuse_models import make_adapter, make_model

    base = make_model(tmp_path / "base", "qwen2", tied=True)
    return base, make_adapter(tmp_path / "adapter", base)
