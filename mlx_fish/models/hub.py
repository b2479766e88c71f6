"""A model's name -> a local folder: the built-in one, a folder, or one fetched from the Hugging Face Hub.

Only safetensors, JSON and tokenizer files are ever fetched; never code, never pickles. Where the Hub is, where its cache
lies and whether it may be asked at all is `huggingface_hub`'s affair (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE). Loads no model.
"""

import re
import threading
from pathlib import Path
from typing import Any

from mlx_fish.errors import FishError, did_you_mean
from mlx_fish.models.folder import RECORD, ModelFolder

DEFAULT_MODEL = "Qwen/Qwen2-0.5B"
MODELS_DIR = Path("models")
TINY = "tiny"
ALLOWED = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]
# Subfolders hold other formats (onnx/, original/); consolidated files are the same weights a second time.
IGNORED = ["*/*", "consolidated*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LONGEST_ID = 96
_REQUEST_SECONDS = 5.0
# A request's own limit does not bound a search for addresses, nor a try of each of them in turn.
_PATIENCE_SECONDS = 7.0


def find_model(name: str | None, *, models_dir: Path = MODELS_DIR, revision: str | None = None) -> ModelFolder:
    """The folder of a model, fetched when needed.

    Args:
        name: `tiny`, a folder, a folder's name inside `models_dir`, or a Hub id `owner/name`. None: the folder that
            `mlx-fish convert` last wrote into `models_dir`, else `DEFAULT_MODEL`.
        revision: a branch, tag or commit of the Hub id.

    Raises:
        FishError: no such model, no safetensors, or an unreachable Hub (within ten seconds).
    """
    if name is None:
        newest = _newest_converted(models_dir)
        return _local(newest) if newest else fetch(DEFAULT_MODEL, revision=revision)
    path = locate(name, models_dir=models_dir)
    if name == TINY and path is not None:
        return ModelFolder(path, TINY)
    return fetch(name, revision=revision) if path is None else _local(path)


def locate(name: str, *, models_dir: Path = MODELS_DIR) -> Path | None:
    """Where a named model lies on this machine; None when it is a Hub id. Asks no network.

    Raises:
        FishError: neither.
    """
    if name == TINY:
        return Path(__file__).parent / TINY
    for path in (_path(name), models_dir / name if "/" not in name else None):
        if path is not None and _exists(path):
            return path
    if not is_hub_id(name):
        raise _no_such_model(name, models_dir)
    return None


def is_hub_id(name: str) -> bool:
    """`owner/name`, and not a path into a folder that exists here."""
    plain = ".." not in name and "--" not in name and not name.endswith(".gguf")
    fits = bool(_HUB_ID.fullmatch(name)) and len(name) <= _LONGEST_ID and plain
    return fits and not Path(name.split("/")[0]).is_dir()


def fetch(name: str, *, revision: str | None = None) -> ModelFolder:
    """Fetch a Hub model into the Hub's own cache; use what lies there when the Hub cannot be reached.

    Returns:
        a folder whose `revision` is the commit's hash.
    """
    from huggingface_hub import constants, snapshot_download

    limits: dict[str, Any] = {"allow_patterns": ALLOWED, "ignore_patterns": IGNORED, "etag_timeout": _REQUEST_SECONDS}
    problem = None if constants.HF_HUB_OFFLINE else _ask_hub(name, revision)
    try:
        cached_only = constants.HF_HUB_OFFLINE or problem is not None
        path = Path(snapshot_download(name, revision=revision, local_files_only=cached_only, **limits))
    except Exception as error:  # two HTTP libraries' errors, by version, and the operating system's
        raise problem or _hub_error(name, error) from error
    folder = ModelFolder(path, name, path.name)
    folder.weights  # noqa: B018  refuses a folder without safetensors
    return folder


def _ask_hub(name: str, revision: str | None) -> FishError | None:
    """Whether the model is there to be fetched; what is wrong when the Hub does not answer.

    Asked before `snapshot_download`, whose first request has no time limit.
    """
    answer: list[Any] = []

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            answer.append(HfApi().model_info(name, revision=revision, timeout=_REQUEST_SECONDS))
        except Exception as error:  # handed over to the thread that waits
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE_SECONDS)
    if not answer:
        return _unreachable(name, "it did not answer")
    if isinstance(answer[0], Exception):
        problem = _hub_error(name, answer[0])
        if _is_answer(answer[0]):
            raise problem from answer[0]
        return problem
    files = [sibling.rfilename for sibling in answer[0].siblings or []]
    if not any(file.endswith(".safetensors") and "/" not in file for file in files):
        raise FishError(
            f"{name} has no safetensors files on the Hub (pickled weights are never read); choose another model."
        )
    return None


def _is_answer(error: Exception) -> bool:
    """The Hub was reached and said no: the cache would only hide that."""
    return 400 <= _status(error) < 500 and _status(error) not in (408, 429)


def _status(error: BaseException | None) -> int:
    """The HTTP status behind an error, 0 when there is none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return 0


def _hub_error(name: str, error: Exception) -> FishError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RevisionNotFoundError

    status = _status(error)
    if isinstance(error, RevisionNotFoundError):
        return FishError(f"{name} has no such revision on the Hub; use another one.")
    if isinstance(error, GatedRepoError) or status == 403:
        page = f"{constants.ENDPOINT}/{name}"
        return FishError(
            f"{name} is not open to everybody; accept its terms at {page}, run `hf auth login`, and try again."
        )
    if status in (401, 404):  # the Hub answers 401 for what is not there, too
        hint = " If it is private, run `hf auth login` first."
        return FishError(f"there is no such model on the Hub: {name}; check the spelling.{hint}")
    if status:
        return _unreachable(name, f"it answered with the error {status}")
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return FishError(
            f"{name} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it; unset it and try again."
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return FishError(f"cannot store {name} in {error.filename}: {error.strerror}.")
    return _unreachable(name, type(error).__name__)


def _unreachable(name: str, why: str) -> FishError:
    from huggingface_hub import constants

    return FishError(
        f"cannot reach the Hub at {constants.ENDPOINT} for {name} ({why}), and it is not in the local cache; check the "
        "network, set HF_ENDPOINT to a mirror, or give a local folder or `tiny`."
    )


def _newest_converted(models_dir: Path) -> Path | None:
    records = [path for path in models_dir.glob(f"*/{RECORD}") if not path.parent.name.startswith(".")]
    converted = [
        path
        for path in records
        if str(ModelFolder(path.parent, "").record.get("made_by")).startswith("mlx-fish convert")
    ]
    return max(converted, key=lambda path: path.stat().st_mtime).parent if converted else None


def _local(path: Path) -> ModelFolder:
    if path.suffix == ".gguf":
        raise FishError(
            f"{path} is a GGUF file; run `mlx-fish convert --model {path}` first, then use the folder it writes."
        )
    if not path.is_dir():
        raise FishError(f"{path} is a file; a model folder was expected.")
    record = ModelFolder(path, "").record
    name = record.get("source")
    revision = record.get("revision")
    if not isinstance(name, str):
        return _checked(ModelFolder(path, str(path.resolve())))
    return _checked(ModelFolder(path, name, revision if isinstance(revision, str) else None))


def _checked(folder: ModelFolder) -> ModelFolder:
    folder.config  # noqa: B018  both are read here so that a wrong folder is refused before anything else happens
    folder.weights  # noqa: B018
    return folder


def _path(name: str) -> Path:
    if not name or "\0" in name:
        raise FishError(
            f"{name!r} is not a model's name; a folder, a Hub id such as {DEFAULT_MODEL}, or `tiny` was expected."
        )
    return Path(name).expanduser()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than the file system allows
        return False


def _no_such_model(name: str, models_dir: Path) -> FishError:
    shown = name if len(name) <= _LONGEST_ID else f"{name[:40]}… ({len(name)} characters)"
    if "://" in name:
        return FishError(f"{shown} is an address; give the model's id alone, such as {DEFAULT_MODEL}.")
    path = _path(name)
    if "/" in name and len(name) <= _LONGEST_ID:
        known = [found.name for found in path.parent.glob("*") if not found.name.startswith(".")]
        return FishError(
            f"there is no file or folder {shown}, and it is no Hub id (owner/name).{did_you_mean(path.name, known)}"
        )
    known = [TINY, *(found.name for found in models_dir.glob("*") if found.is_dir() and not found.name.startswith("."))]
    return FishError(
        f"there is no model {shown}; a folder, a Hub id such as {DEFAULT_MODEL}, or `tiny` was expected."
        f"{did_you_mean(name[:_LONGEST_ID], known)}"
    )
