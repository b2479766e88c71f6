"""Resolve a model name to a local folder: the built-in model, a folder, or a download from the Hugging Face Hub.

Only safetensors, JSON and tokenizer files are downloaded, never code and never pickles. `huggingface_hub`
determines the endpoint, the cache location and offline mode (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE). Loads no
model.
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
# Subfolders contain other formats (onnx/, original/); consolidated files are a second copy of the same weights.
IGNORED = ["*/*", "consolidated*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_MAX_ID_LENGTH = 96
_REQUEST_SECONDS = 5.0
# The timeout of a request covers neither DNS resolution nor trying several addresses in turn, so the total is
# bounded too.
_TOTAL_SECONDS = 7.0


def find_model(name: str | None, *, models_dir: Path = MODELS_DIR, revision: str | None = None) -> ModelFolder:
    """Return the folder of a model, downloading it from the Hub if necessary.

    Args:
        name: `tiny`, a folder, the name of a folder in `models_dir`, or a Hub id `owner/name`. None: the
            folder that `mlx-fish convert` last wrote to `models_dir`, else `DEFAULT_MODEL`.
        revision: branch, tag or commit of a Hub model.

    Raises:
        FishError: the model does not exist, has no safetensors files, or the Hub is unreachable (raised
            within ten seconds).
    """
    if name is None:
        newest = _newest_converted(models_dir)
        return _open_local(newest) if newest else fetch(DEFAULT_MODEL, revision=revision)
    path = locate(name, models_dir=models_dir)
    if name == TINY and path is not None:
        return ModelFolder(path, TINY)
    return fetch(name, revision=revision) if path is None else _open_local(path)


def locate(name: str, *, models_dir: Path = MODELS_DIR) -> Path | None:
    """Return the local path of a model, or None if `name` is a Hub id. Makes no network request.

    Raises:
        FishError: `name` is neither an existing path nor a valid Hub id.
    """
    if name == TINY:
        return Path(__file__).parent / TINY
    for path in (_to_path(name), models_dir / name if "/" not in name else None):
        if path is not None and _exists(path):
            return path
    if not is_hub_id(name):
        raise _no_such_model(name, models_dir)
    return None


def is_hub_id(name: str) -> bool:
    """Return whether `name` is a Hub id `owner/name`, and not a path into an existing local folder."""
    allowed = ".." not in name and "--" not in name and not name.endswith(".gguf")
    is_valid = bool(_HUB_ID.fullmatch(name)) and len(name) <= _MAX_ID_LENGTH and allowed
    return is_valid and not Path(name.split("/")[0]).is_dir()


def fetch(name: str, *, revision: str | None = None) -> ModelFolder:
    """Download a Hub model to the Hugging Face cache; use the cached copy if the Hub cannot be reached.

    Returns:
        A folder whose `revision` is the commit hash.

    Raises:
        FishError: see `find_model`.
    """
    from huggingface_hub import constants, snapshot_download

    options: dict[str, Any] = {"allow_patterns": ALLOWED, "ignore_patterns": IGNORED, "etag_timeout": _REQUEST_SECONDS}
    hub_error = None if constants.HF_HUB_OFFLINE else _check_hub(name, revision)
    try:
        cached_only = constants.HF_HUB_OFFLINE or hub_error is not None
        path = Path(snapshot_download(name, revision=revision, local_files_only=cached_only, **options))
    except Exception as error:  # from one of two HTTP libraries, depending on the version, or the operating system
        raise hub_error or _translate_error(name, error) from error
    folder = ModelFolder(path, name, path.name)
    folder.weights  # noqa: B018  raises if the folder has no safetensors files
    return folder


def _check_hub(name: str, revision: str | None) -> FishError | None:
    """Check that the Hub has the model.

    Returns the error instead of raising it if the Hub cannot be reached, so that the cache can be tried.
    Called before `snapshot_download`, whose first request has no timeout.

    Raises:
        FishError: the Hub rejects the request, or the model has no safetensors files.
    """
    responses: list[Any] = []  # the model info or an exception; empty on a timeout

    def request() -> None:
        from huggingface_hub import HfApi

        try:
            responses.append(HfApi().model_info(name, revision=revision, timeout=_REQUEST_SECONDS))
        except Exception as error:  # handled by the waiting thread
            responses.append(error)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(_TOTAL_SECONDS)
    if not responses:
        return _unreachable(name, "it did not answer")
    if isinstance(responses[0], Exception):
        hub_error = _translate_error(name, responses[0])
        if _is_rejection(responses[0]):
            raise hub_error from responses[0]
        return hub_error
    files = [sibling.rfilename for sibling in responses[0].siblings or []]
    if not any(file.endswith(".safetensors") and "/" not in file for file in files):
        raise FishError(
            f"{name} has no safetensors files on the Hub (pickled weights are never read); choose another model."
        )
    return None


def _is_rejection(error: Exception) -> bool:
    """Return whether the Hub rejected the request, an error that falling back to the cache would only hide."""
    return 400 <= _http_status(error) < 500 and _http_status(error) not in (408, 429)


def _http_status(error: BaseException | None) -> int:
    """Return the HTTP status that caused an error, or 0 if there is none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return 0


def _translate_error(name: str, error: Exception) -> FishError:
    """Return a FishError that explains an error of `huggingface_hub` and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RevisionNotFoundError

    status = _http_status(error)
    if isinstance(error, RevisionNotFoundError):
        return FishError(f"{name} has no such revision on the Hub; use another one.")
    if isinstance(error, GatedRepoError) or status == 403:
        page = f"{constants.ENDPOINT}/{name}"
        return FishError(
            f"access to {name} is restricted; accept its terms at {page}, run `hf auth login`, and try again."
        )
    if status in (401, 404):  # the Hub also answers 401 for a model that does not exist
        hint = " If it is private, run `hf auth login` first."
        return FishError(f"there is no such model on the Hub: {name}; check the spelling.{hint}")
    if status:
        return _unreachable(name, f"it answered with the error {status}")
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return FishError(
            f"{name} is not in the local cache, and HF_HUB_OFFLINE prevents the download; unset it and try again."
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return FishError(f"cannot store {name} in {error.filename}: {error.strerror}.")
    return _unreachable(name, type(error).__name__)


def _unreachable(name: str, reason: str) -> FishError:
    from huggingface_hub import constants

    return FishError(
        f"cannot reach the Hub at {constants.ENDPOINT} for {name} ({reason}), and it is not in the local cache; "
        "check the network, set HF_ENDPOINT to a mirror, or use a local folder or `tiny`."
    )


def _newest_converted(models_dir: Path) -> Path | None:
    """Return the folder in `models_dir` that `mlx-fish convert` wrote last."""
    records = [path for path in models_dir.glob(f"*/{RECORD}") if not path.parent.name.startswith(".")]
    converted = [
        path
        for path in records
        if str(ModelFolder(path.parent, "").record.get("made_by")).startswith("mlx-fish convert")
    ]
    return max(converted, key=lambda path: path.stat().st_mtime).parent if converted else None


def _open_local(path: Path) -> ModelFolder:
    """Return the model folder at `path`, named after the source in its record."""
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
    folder.config  # noqa: B018  both are read here, so that an invalid folder is rejected before any other work
    folder.weights  # noqa: B018
    return folder


def _to_path(name: str) -> Path:
    if not name or "\0" in name:
        raise FishError(
            f"{name!r} is not a model name; a folder, a Hub id such as {DEFAULT_MODEL}, or `tiny` was expected."
        )
    return Path(name).expanduser()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is longer than the file system allows
        return False


def _no_such_model(name: str, models_dir: Path) -> FishError:
    """Return the error for a name that is neither a path nor a Hub id; it suggests a similar folder."""
    short_name = name if len(name) <= _MAX_ID_LENGTH else f"{name[:40]}… ({len(name)} characters)"
    if "://" in name:
        return FishError(f"{short_name} is a URL; pass only the model id, such as {DEFAULT_MODEL}.")
    path = _to_path(name)
    if "/" in name and len(name) <= _MAX_ID_LENGTH:
        known = [sibling.name for sibling in path.parent.glob("*") if not sibling.name.startswith(".")]
        return FishError(
            f"there is no file or folder {short_name}, and it is not a Hub id (owner/name)."
            f"{did_you_mean(path.name, known)}"
        )
    known = [
        TINY,
        *(folder.name for folder in models_dir.glob("*") if folder.is_dir() and not folder.name.startswith(".")),
    ]
    return FishError(
        f"there is no model {short_name}; a folder, a Hub id such as {DEFAULT_MODEL}, or `tiny` was expected."
        f"{did_you_mean(name[:_MAX_ID_LENGTH], known)}"
    )
