"""Names become folders; the Hub is asked through its own client, against a small server on loopback."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_folders as tiny_model

from mlx_fish.errors import FishError
from mlx_fish.models import hub
from mlx_fish.models.convert import convert

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What `snapshot_download` asks of the Hub: a model's info, its tree, and the files. Notes every request."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.requests: list[str] = []
        self.status: dict[str, tuple[int, str]] = {}  # path prefix -> (status, X-Error-Code)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def log_message(self, *args: object) -> None:
                """Quiet: the requests are in `hub.requests`."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = handler.path.split("?")[0]
        self.requests.append(path)
        for prefix, (status, code) in self.status.items():
            if path.startswith(prefix):
                return self.send(handler, status, b"{}", {"X-Error-Code": code} if code else {}, with_body)
        if path in ("/api/models/fish/small", "/api/models/fish/small/revision/main"):
            siblings = [{"rfilename": name} for name in self.files]
            return self.send_json(handler, {"id": "fish/small", "sha": COMMIT, "siblings": siblings}, with_body)
        if path.startswith("/api/models/fish/small/tree/"):
            return self.send_json(handler, [self.entry(name) for name in self.files], with_body)
        prefix = f"/fish/small/resolve/{COMMIT}/"
        if path.startswith(prefix) and path[len(prefix) :] in self.files:
            content = self.files[path[len(prefix) :]]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.send(handler, 200, content, headers, with_body)
        code = "EntryNotFound" if "/resolve/" in path else "RepoNotFound"
        return self.send(handler, 404, b"{}", {"X-Error-Code": code}, with_body)

    def entry(self, name: str) -> dict[str, object]:
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send_json(self, handler: BaseHTTPRequestHandler, value: object, with_body: bool) -> None:
        self.send(handler, 200, json.dumps(value).encode(), {"Content-Type": "application/json"}, with_body)

    def send(
        self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], with_body: bool
    ) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if with_body:
            handler.wfile.write(body)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    folder = tiny_model.write_folder(tmp_path / "on_the_hub", shard_bytes=100_000)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {
        "modeling_fish.py": b"raise SystemExit('code was run')",
        "pytorch_model.bin": b"pickle",
        "model.pt": b"pickle",
        "consolidated.safetensors": b"the same again",
        "onnx/model.safetensors": b"another format",
        "README.md": b"# a card",
    }
    hub_server = Hub(files)
    yield hub_server
    hub_server.server.shutdown()
    hub_server.server.server_close()


def ask(endpoint: str, home: Path, *lines: str, **environment: str) -> tuple[str, str, float]:
    """Run lines in a child with the Hub at `endpoint`; its stdout, stderr and seconds. FishErrors go to stdout.

    The seconds are those of the lines alone: how long Python takes to start on a busy machine is not the Hub's.
    """
    program = "\n".join(
        [
            "import time",
            "from pathlib import Path",
            "from mlx_fish.models.hub import find_model",
            "from mlx_fish.models.convert import convert",
            "from mlx_fish.errors import FishError",
            "import huggingface_hub.errors",
            "started = time.monotonic()",
            "try:",
            *("    " + line for line in lines),
            "except FishError as error:",
            "    print('FishError:', error)",
            "print(time.monotonic() - started)",
        ]
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=env, timeout=60, check=False
    )
    assert child.returncode == 0, child.stderr
    out, _, seconds = child.stdout.strip().rpartition("\n")
    return out, child.stderr, float(seconds)


FIND = ("folder = find_model('fish/small')", "print(folder.name, folder.revision, folder.path)")


def test_only_safetensors_json_and_tokenizer_files_are_fetched(server: Hub, tmp_path: Path) -> None:
    out, err, _ = ask(server.url, tmp_path / "home", *FIND)
    assert out.startswith(f"fish/small {COMMIT} "), out + err
    folder = Path(out.split(" ", 2)[2])
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "on_the_hub").iterdir()}
    asked = " ".join(server.requests)
    for unwanted in (".py", ".bin", ".pt", "consolidated", "onnx", "README"):
        assert unwanted not in asked, unwanted


def test_convert_from_the_hub_records_the_commit(server: Hub, tmp_path: Path) -> None:
    target = tmp_path / "out"
    call = f"result = convert(model='fish/small', out=Path({str(target)!r}))"
    out, err, _ = ask(server.url, tmp_path / "home", call, "print(result.source, result.revision)")
    assert out == f"fish/small {COMMIT}", out + err
    record = json.loads((target / "mlx_fish.json").read_text())
    assert (record["source"], record["revision"]) == ("fish/small", COMMIT)
    again = hub.find_model(str(target))
    assert (again.name, again.revision, again.path) == ("fish/small", COMMIT, target)


@pytest.mark.parametrize("how", ["dead", "offline", "error 500"])
def test_the_cache_serves_when_the_hub_does_not(server: Hub, tmp_path: Path, how: str) -> None:
    first, _, _ = ask(server.url, tmp_path / "home", *FIND)
    fetched = len(server.requests)
    if how == "dead":
        second, err, seconds = ask(dead_port(), tmp_path / "home", *FIND)
    elif how == "offline":
        second, err, seconds = ask(server.url, tmp_path / "home", *FIND, HF_HUB_OFFLINE="1")
        assert len(server.requests) == fetched
    else:
        server.status["/"] = (500, "")
        second, err, seconds = ask(server.url, tmp_path / "home", *FIND)
    assert second == first, err
    assert seconds < 10


def dead_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_dead_hub_is_one_sentence_at_once(tmp_path: Path) -> None:
    out, err, seconds = ask(dead_port(), tmp_path / "home", *FIND)
    assert out.startswith("FishError: cannot reach the Hub at http://127.0.0.1") and out.count("\n") == 0
    assert "Traceback" not in err and seconds < 6


def test_a_silent_hub_is_one_sentence_within_ten_seconds(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)  # the kernel accepts, nobody answers
        out, err, seconds = ask(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "home", *FIND)
    assert out.startswith("FishError: cannot reach the Hub") and out.count("\n") == 0, err
    assert "Traceback" not in err and seconds < 10


@pytest.mark.parametrize(
    ("path", "status", "code", "words"),
    [
        ("/api/models/fish/small", 404, "RepoNotFound", "no such model on the Hub: fish/small"),
        ("/api/models/fish/small", 401, "RepoNotFound", "no such model on the Hub: fish/small"),
        ("/api/models/fish/small", 403, "GatedRepo", "accept its terms"),
        ("/fish/small/resolve", 401, "GatedRepo", "accept its terms"),
        ("/fish/small/resolve", 403, "", "hf auth login"),
        ("/api/models/fish/small", 503, "", "answered with the error 503"),
    ],
)
def test_what_the_hub_says_in_words(server: Hub, tmp_path: Path, path: str, status: int, code: str, words: str) -> None:
    server.status[path] = (status, code)
    out, err, seconds = ask(server.url, tmp_path / "home", *FIND, HF_TOKEN="hf_secretsecret")
    assert out.startswith("FishError: ") and words in out and out.count("\n") == 0, out + err
    assert "Traceback" not in err and "hf_secretsecret" not in out + err and seconds < 10


def test_a_model_of_pickles_alone_is_refused_before_anything_is_fetched(server: Hub, tmp_path: Path) -> None:
    server.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle", "onnx/model.safetensors": b"no"}
    out, _, _ = ask(server.url, tmp_path / "home", *FIND)
    assert "no safetensors" in out
    assert not any("/resolve/" in path for path in server.requests)


def test_offline_and_not_cached(tmp_path: Path) -> None:
    out, _, _ = ask(dead_port(), tmp_path / "home", *FIND, HF_HUB_OFFLINE="1")
    assert out.startswith("FishError: fish/small is not in the local cache, and HF_HUB_OFFLINE")


def test_without_a_name_the_last_converted_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "fetch", lambda name, **_: name)
    models = tmp_path / "models"
    assert hub.find_model(None, models_dir=models) == "Qwen/Qwen2-0.5B"
    source = tiny_model.write_folder(tmp_path / "source")
    for age, name in ((30, "old"), (10, "new"), (20, "middle")):
        convert(model=str(source), out=models / name)
        os.utime(models / name / "mlx_fish.json", (time.time() - age,) * 2)
    tiny_model.write_folder(models / "somebody_elses")
    (models / "fused").mkdir()
    (models / "fused" / "mlx_fish.json").write_text('{"made_by": "mlx-fish fuse"}')
    assert hub.find_model(None, models_dir=models).path == models / "new"
    assert hub.find_model("old", models_dir=models).path == models / "old"
    with pytest.raises(FishError, match="Did you mean `middle`"):
        hub.find_model("midle", models_dir=models)


def test_local_folders(tmp_path: Path) -> None:
    source = tiny_model.write_folder(tmp_path / "source")
    found = hub.find_model(str(source))
    assert (found.path, found.name, found.revision) == (source, str(source), None)
    converted = convert(model=str(source), out=tmp_path / "out").path
    assert hub.find_model(str(converted)).name == str(source)
    with pytest.raises(FishError, match="Did you mean `source`"):
        hub.find_model(str(tmp_path / "sorce"))
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(FishError, match=r"mlx-fish convert --model .*a\.gguf"):
        hub.find_model(str(gguf))
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(FishError, match="pickled"):
        hub.find_model(str(source))


def test_a_path_into_a_folder_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda *a, **k: pytest.fail("asked the Hub"))
    tiny_model.write_folder(tmp_path / "models" / "mine")
    with pytest.raises(FishError, match="Did you mean `mine`"):
        hub.find_model("models/mien")
    assert hub.is_hub_id("Qwen/Qwen2-0.5B") and not hub.is_hub_id("models/Qwen2-0.5B")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tinny", "Did you mean `tiny`"),
        ("", "''"),
        ("a\0b", "not a model name"),
        ("../../nowhere", "no file or folder"),
        ("/nowhere/at/all", "no file or folder"),
        ("x" * 5000, r"5000 characters"),
        ("x/" + "y" * 5000, r"5002 characters"),
        ("https://huggingface.co/Qwen/Qwen2-0.5B", "is a URL"),
        ("a/b/c", "not a Hub id"),
        ("owner/..", "no file or folder"),
    ],
)
def test_names_that_are_no_models(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "fetch", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(FishError, match=words) as caught:
        hub.find_model(name)
    assert len(str(caught.value)) < 400 and "\0" not in str(caught.value)


def test_the_built_in_model() -> None:
    found = hub.find_model("tiny")
    assert found.name == "tiny" and found.path == Path(hub.__file__).parent / "tiny"
