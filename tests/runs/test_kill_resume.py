"""Twenty kills at random moments (`tools/kill_resume.py` does more)."""

import subprocess
import sys

from paths import ROOT

SCRIPT = ROOT / "tools" / "kill_resume.py"


def test_twenty_kills_at_random_moments(tmp_path, backend_name):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "20" if backend_name == "mlx" else "5"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seed 1: 20 kills" if backend_name == "mlx" else "seed 1: 5 kills")
    assert "equal to the bit" in done.stdout
