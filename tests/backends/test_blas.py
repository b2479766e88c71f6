"""OpenBLAS for MLX on Linux: the system's where it is there, else the package's with its symbols renamed, without root."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_fish.backends import blas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX's other builds need no BLAS")

# Two matrix products of the same size, with the system's OpenBLAS hidden; the reference BLAS takes seconds for them.
PROGRAM = """
import sys, time
from mlx_fish.backends import blas
blas._SYSTEM_NAMES = ()
loaded = blas.load_openblas()
import mlx.core as mx
left, right = mx.random.normal((1024, 1024)), mx.random.normal((1024, 1024))
mx.eval(left, right)
seconds = []
for _ in range(3):
    started = time.perf_counter()
    mx.eval(left @ right)
    seconds.append(time.perf_counter() - started)
expected = sum(float(left[3, k].item()) * float(right[k, 5].item()) for k in range(1024))
print(loaded, 2e-9 * 1024**3 / min(seconds), abs((left @ right)[3, 5].item() - expected) < 1e-3)
"""


def run(cache: str) -> tuple[str, float, str]:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env={**os.environ, "XDG_CACHE_HOME": cache}, capture_output=True, text=True, check=True
    )
    loaded, rate, right = done.stdout.split()
    return loaded, float(rate), right


@pytest.mark.process
def test_the_packages_library_is_used_and_kept_in_the_cache(tmp_path: Path) -> None:
    for _ in range(2):
        loaded, rate, right = run(str(tmp_path))
        assert (loaded, right) == ("True", "True")
        assert rate > 15, "the reference BLAS makes 5 GFLOP/s"
        assert len(list((tmp_path / "mlx-fish").iterdir())) == 1
    assert (tmp_path / "mlx-fish").stat().st_mode & 0o077 == 0


@pytest.mark.process
@pytest.mark.parametrize("place", ["nowhere to write", "others can write"])
def test_without_a_cache_of_our_own_a_temporary_copy_is_used(tmp_path: Path, place: str) -> None:
    cache = "/proc/nothing"
    if place == "others can write":
        (tmp_path / "mlx-fish").mkdir()
        (tmp_path / "mlx-fish").chmod(0o777)
        cache = str(tmp_path)
    assert run(cache)[::2] == ("True", "True")
    assert not list(tmp_path.glob("mlx-fish/*"))


def test_the_systems_library_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(blas, "_load", lambda name: asked.append(name) is None)
    monkeypatch.setattr(blas, "_load_package", lambda: pytest.fail("the package was asked"))
    assert blas.load_openblas()
    assert asked == ["libopenblas.so.0"]


@pytest.mark.parametrize("missing", ["package", "patchelf"])
def test_neither_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(blas, "_SYSTEM_NAMES", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if missing == "package":
        monkeypatch.setattr(blas, "_PACKAGE", "no_such_package")
    else:
        monkeypatch.setattr(blas.shutil, "which", lambda name: None)
        monkeypatch.setattr(blas.sysconfig, "get_path", lambda name: str(tmp_path))
    assert not blas.load_openblas()
    assert not list(tmp_path.glob("mlx-fish/*"))
