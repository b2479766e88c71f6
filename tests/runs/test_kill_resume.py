"""Kills at random moments, other ones each day (`tools/kill_resume.py N` does as many as you like)."""

import pytest
from programs import run
from rotation import TODAY

KILLS = {"mlx": 6, "torch": 3}


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path, backend_name):
    count = KILLS[backend_name]
    done = run("tools/kill_resume.py", str(count), "--seed", str(TODAY), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"seed {TODAY}: {count} kills")
    assert "equal to the bit" in done.stdout
