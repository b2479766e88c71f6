"""What Windows lacks is asked of it nowhere: the whole main job on torch without fcntl, resource, SIGHUP, os.fork and their like.

A machine with Windows runs the same in the workflow; here the modules and names are hidden from mlx_fish.
"""

import subprocess
import sys

import pytest

PROGRAM = """
import builtins, os, runpy, signal, sys
import filelock, peft, torch, transformers, huggingface_hub, matplotlib.figure  # they know Windows by themselves
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for module, names in ((signal, ("SIGHUP", "SIGKILL", "alarm")), (os, ("fork", "getuid", "O_NOFOLLOW"))):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.argv = ["mlx-fish", *sys.argv[1:]]
runpy.run_module("mlx_fish", run_name="__main__", alter_sys=True)
"""


@pytest.mark.process
def test_the_main_job_without_what_windows_lacks(tmp_path):
    for arguments in (
        "convert --model tiny --out models/tiny",
        "train --model models/tiny --iters 2 --save-every 1 --backend torch",
        "train --resume --iters 3",
        "evaluate --backend torch --json",
        "generate -p hello --max-tokens 4 --backend torch",
        "fuse --to-hf --to-gguf f16 --no-verify --out fused",
        "plan --backend torch --json",
    ):
        command = [sys.executable, "-c", PROGRAM, *arguments.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}\n{done.stderr}"
