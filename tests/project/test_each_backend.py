"""The hook that counts what ran on which backend."""

import shutil
import subprocess
import sys

import pytest
from paths import TESTS

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("chosen", "code", "counts"), [("", 0, "mlx: 1, on torch: 1"), ("mlx", 1, "mlx: 1, on torch: 0")]
)
def test_a_backend_that_ran_no_test_fails_the_suite(tmp_path, chosen, code, counts):
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text("def test_it(backend_name):\n    assert backend_name\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--each-backend", "-k", chosen]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert counts in done.stdout
