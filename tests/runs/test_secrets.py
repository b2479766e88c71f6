"""A token in the environment is the Hub library's affair: no command, failing or not, writes it anywhere."""

import os
import subprocess
import sys

import pytest

from mlx_fish.cli import main
from mlx_fish.config import TrainConfig

pytestmark = pytest.mark.process

SENTINEL = "hf_SentinelThatMustNotBeWritten0123456789"
COMMANDS = [
    ["train", "--model", "tiny", "--iters", "1"],
    ["--debug", "train", "--model", "tiny", "--iters", "1"],  # the folder is taken: a traceback
    ["train", "--model", "owner/private-model", "--output-dir", "other"],
    ["--debug", "convert", "--model", "owner/private-model"],
    ["evaluate", "--json"],
    ["fuse", "--to-hf"],
]


def test_the_token_is_written_nowhere(tmp_path):
    home = tmp_path / "home"
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        **os.environ,
        **dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), SENTINEL),
        "HF_HOME": str(home),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody answers there
    }
    codes = []
    for arguments in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_fish", *arguments], cwd=work, env=environment, capture_output=True, check=False
        )
        codes.append(done.returncode)
        assert SENTINEL.encode() not in done.stdout + done.stderr, arguments
    assert codes == [0, 1, 1, 1, 0, 0]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        assert SENTINEL.encode() not in path.read_bytes(), path


def test_there_is_no_setting_for_a_token():
    options = [name for command in main.commands.values() for option in command.params for name in option.opts]
    assert len(options) > 40
    secret = ("token", "password", "secret", "api")
    names = [name for name in [*options, *TrainConfig.__dataclass_fields__] if any(word in name for word in secret)]
    assert [name for name in names if name != "--max-tokens"] == []


@pytest.mark.parametrize("name", ["HF_TOKEN", "token"])
def test_a_yaml_file_takes_no_token(tmp_path, name):
    from mlx_fish.config import read_yaml
    from mlx_fish.errors import FishError

    (tmp_path / "a.yaml").write_text(f"{name}: {SENTINEL}\n")
    with pytest.raises(FishError) as error:
        read_yaml(tmp_path / "a.yaml")
    assert SENTINEL not in str(error.value)
