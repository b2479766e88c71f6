"""Model, adapter and template that belong together: what `generate` and `evaluate` begin with."""

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
    """Everything known before the weights are loaded."""

    folder: ModelFolder
    adapter: Adapter | None
    template: Template
    backend: str = "auto"

    @property
    def end_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.template.end_token_id, *self.folder.end_token_ids)))

    def load(self) -> Backend:
        """Load the weights, the adapter on them."""
        backend = load_backend(self.folder, lambda text: say(f"! {text}"), name=self.backend)
        say(f"computing with {backend.name} on {backend.device}, {backend.dtype}")
        if self.adapter is not None:
            backend.attach(self.adapter.spec, self.adapter.arrays)
        return backend


def adapter_base(adapter: Path, model: str | None) -> ModelFolder:
    """The model that an adapter was trained on: the one asked for, the folder that training used, or the one it names."""
    if model is not None:
        return find_model(model)
    base = read_run(adapter).get("base", {})
    path = base.get("path")
    if isinstance(path, str) and (path_of(path) / "config.json").is_file():
        return ModelFolder(path_of(path), base.get("name", path), base.get("revision"))
    name = load_adapter(adapter).base
    if not name:
        raise FishError(f"{adapter} does not say which model it was trained on; name it with --model.")
    return find_model(name)


def load_session(*, model: str | None, adapter: Path | None, no_adapter: bool, backend: str = "auto") -> Session:
    """Find the backend, the adapter, its base and the template that it was trained with.

    Without an adapter (none trained yet, or `--no-adapter`) the base alone: in the run's template where the base is the run's, so
    that both are asked alike, else in the one that training would choose.
    """
    backend = choose_backend(backend)
    place = find_adapter(adapter)
    if place is None:
        if adapter is None and not no_adapter:
            say(f"! no adapter in {DEFAULT_OUTPUT}/, so this is the base model; `mlx-fish train` makes one.")
        folder = find_model(model)
        return Session(folder, None, choose_template("auto", load_tokenizer(folder), folder), backend)
    folder = adapter_base(place, model)
    found = None if no_adapter else load_adapter(place)
    if found is not None:
        check_plain(found, "answering")
        check_fits(found, folder.linear_layers, folder.name)
        check_base(found, folder.fingerprint, folder.name)
    run = read_run(place)
    another = found is None and run.get("base", {}).get("fingerprint") != folder.fingerprint
    name = "auto" if another else run.get("template", {}).get("name", "auto")
    tokenizer = load_tokenizer(folder)
    check_template_name(name)
    return Session(folder, found, choose_template(name, tokenizer, folder), backend)
