"""Run the programs that lie beside the package."""

import subprocess
import sys
from pathlib import Path

from paths import ROOT


def run(program: str, *arguments: str, cwd: Path, typed: str = "") -> subprocess.CompletedProcess[str]:
    """`python PROGRAM ARGUMENTS…`, with the path of the program from the repository's top."""
    command = [sys.executable, str(ROOT / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=typed, check=False)
