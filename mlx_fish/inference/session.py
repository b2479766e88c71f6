"""Find a model, its adapter and its template, and load them for `generate` and `evaluate`."""

from dataclasses import dataclass
from pathlib import Path

from mlx_fish.adapters.peft import Adapter, check_fits, check_plain, load_adapter
from mlx_fish.backends.choose import choose_backend, load_backend
from mlx_fish.backends.protocol import Backend
from mlx_fish.data.templates.template import Template, check_template_name, choose_template
from mlx_fish.data.templates.tokenizer import load_tokenizer
from mlx_fish.errors import FishError
from mlx_fish.models.folder import ModelFolder
from mlx_fish.models.hub import find_model
from mlx_fish.runs.folder import DEFAULT_OUTPUT, find_adapter, read_run
from mlx_fish.runs.record import check_base
from mlx_fish.storage.files import path_of
from mlx_fish.tracking.events import say


@dataclass(frozen=True)
class Session:
    """A base model folder, an optional adapter and the prompt template, before any weights are loaded."""

    folder: ModelFolder
    adapter: Adapter | None
    template: Template
    backend: str = "auto"

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: the template's end token, then the model's own."""
        return tuple(dict.fromkeys((self.template.end_token_id, *self.folder.end_token_ids)))

    def load(self) -> Backend:
        """Load the base model into its backend, and attach the adapter."""
        backend = load_backend(self.folder, lambda text: say(f"! {text}"), name=self.backend)
        say(f"computing with {backend.name} on {backend.device}, {backend.dtype}")
        if self.adapter is not None:
            backend.attach(self.adapter.spec, self.adapter.arrays)
        return backend


def adapter_base(adapter: Path, model: str | None) -> ModelFolder:
    """Find the base model of an adapter.

    Args:
        model: the model to use; None: the folder used in training if it still exists, else the model that the
            adapter's config names.

    Raises:
        FishError: the adapter does not name its base, or the model cannot be found.
    """
    if model is not None:
        return find_model(model)
    base = read_run(adapter).get("base", {})
    path = base.get("path")
    if isinstance(path, str) and (path_of(path) / "config.json").is_file():
        return ModelFolder(path_of(path), base.get("name", path), base.get("revision"))
    name = load_adapter(adapter).base
    if not name:
        raise FishError(f"{adapter} does not name its base model; set --model.")
    return find_model(name)


def load_session(*, model: str | None, adapter: Path | None, no_adapter: bool, backend: str = "auto") -> Session:
    """Find the adapter, its base model and the template that it was trained with.

    Without an adapter (none trained yet, or `no_adapter`), the session has only the base. If the run used this base,
    the session uses the run's template, so that base and tuned model get the same prompts. Otherwise it uses the
    template that training would choose.

    Args:
        model: base model; None: see `adapter_base`.
        adapter: adapter folder; None: the default output folder, if it exists.
        no_adapter: use only the base.
        backend: see `choose_backend`.

    Raises:
        FishError: the adapter or the model cannot be found, or they do not match.
    """
    backend = choose_backend(backend)
    adapter_path = find_adapter(adapter)
    if adapter_path is None:
        if adapter is None and not no_adapter:
            say(f"! no adapter in {DEFAULT_OUTPUT}/, so this is the base model; `mlx-fish train` trains one")
        folder = find_model(model)
        return Session(folder, None, choose_template("auto", load_tokenizer(folder), folder), backend)
    folder = adapter_base(adapter_path, model)
    loaded_adapter = None if no_adapter else load_adapter(adapter_path)
    if loaded_adapter is not None:
        check_plain(loaded_adapter, "answering")
        check_fits(loaded_adapter, folder.linear_layers, folder.name)
        check_base(loaded_adapter, folder.fingerprint, folder.name)
    run = read_run(adapter_path)
    is_other_base = loaded_adapter is None and run.get("base", {}).get("fingerprint") != folder.fingerprint
    name = "auto" if is_other_base else run.get("template", {}).get("name", "auto")
    tokenizer = load_tokenizer(folder)
    check_template_name(name)
    return Session(folder, loaded_adapter, choose_template(name, tokenizer, folder), backend)
