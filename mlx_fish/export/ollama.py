"""A folder for `ollama create`: the Modelfile beside the GGUF files, with template, system prompt, stops and sampling.

Ollama is told everything: what it guesses is wrong for a tuned model, and a wrong template or stop is what people complain
of most. Knows nothing of how the GGUF files are made.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_fish.errors import FishError
from mlx_fish.export.go_template import GoTemplate, Message, go_template
from mlx_fish.export.modelfile import ModelfileError, written
from mlx_fish.export.writer import MergedModel
from mlx_fish.models.folder import ModelFolder
from mlx_fish.storage.files import write_text

_NAME = re.compile(r"([a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*(:[A-Za-z0-9][A-Za-z0-9._-]*)?")
_LEAST_CONTEXT = 4096
# generation_config.json -> PARAMETER. Ollama looks back 64 tokens for repetitions, transformers at everything.
_SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise FishError(
            f"--to-ollama {name}: a name of small letters, digits and . _ - was expected, such as fish or me/fish:v1."
        )


def check_ollama() -> None:
    """Refuse `--create` before any work when there is no ollama."""
    if shutil.which("ollama") is None:
        raise FishError(
            "--create needs `ollama` on the PATH, and it is not there; leave it out, and create the model later."
        )


def write_modelfile(
    folder: Path, model: MergedModel, *, name: str, file_name: str, adapter_name: str | None = None
) -> None:
    """Write `Modelfile` beside the GGUF files that it names.

    Raises:
        FishError: no chat template, or one that no Ollama TEMPLATE can say.
    """
    tokenizer = _tokenizer(model)
    template = template_of(model, tokenizer)
    generation = model.generation_config
    system, go_text = model.system, template.text()
    lines = [
        "# Made by mlx-fish. In this folder:\n",
        f"#   ollama create {name} -f Modelfile\n",
        f"#   ollama run {name}\n",
        written("FROM", f"./{file_name}"),
    ]
    if adapter_name is not None:
        lines.append(written("ADAPTER", f"./{adapter_name}"))
    if system is not None:
        try:
            command = written("SYSTEM", system)
        except ModelfileError:  # what SYSTEM cannot hold, TEMPLATE can: Go strings have escapes
            go_text, command = (
                template.text(system=system),
                "# The system prompt is in the TEMPLATE: SYSTEM cannot hold it.\n",
            )
        lines.append(command)
    lines.append(_template_command(go_text))
    lines += [
        written(f"PARAMETER {key}", value) for key, value in parameters(generation, _stops(generation, tokenizer))
    ]
    lines.append(written("PARAMETER num_ctx", str(_context(model))))
    if model.license:
        lines.append(written("LICENSE", model.license))
    write_text(folder / "Modelfile", "".join(lines))


def template_of(model: MergedModel, tokenizer: Any) -> GoTemplate:
    """The Go form of the chat template that the model was tuned with."""
    jinja = model.own_template()
    if jinja is None:
        raise FishError(
            "this model has no chat template, and Ollama needs one; use --to-gguf, or train with --template chatml."
        )

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = tokenizer.apply_chat_template(
                turns, chat_template=jinja, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # Jinja's errors, and what a template raises by itself
            raise FishError(f"the chat template cannot render a conversation ({error}).") from error
        return text

    bos = tokenizer.bos_token
    adds_bos = bos and tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
    return go_template(render, bos=bos if adds_bos else "")


def parameters(generation: Mapping[str, Any], stops: Sequence[str]) -> list[tuple[str, str]]:
    """PARAMETER lines for a generation config, whose silence means greedy."""
    found = [("stop", stop) for stop in stops]
    if generation.get("do_sample"):
        found += [
            (name, _number(generation[key])) for key, name in _SAMPLING.items() if generation.get(key) is not None
        ]
        if generation.get("temperature") is None:
            found.append(("temperature", "1"))  # transformers' default; Ollama's is 0.8
    else:
        found.append(("temperature", "0"))
    penalty = generation.get("repetition_penalty")
    if penalty is not None and penalty != 1:
        found += [("repeat_penalty", _number(penalty)), ("repeat_last_n", "-1")]
    if generation.get("max_new_tokens"):
        found.append(("num_predict", _number(generation["max_new_tokens"])))
    return found


def create_model(folder: Path, name: str, question: str) -> str:
    """Run `ollama create`, its progress on our stderr, then ask the new model one question; returns its answer."""
    check_ollama()
    import sys

    commands = [["ollama", "create", name, "-f", "Modelfile"], ["ollama", "run", name, question]]
    for number, command in enumerate(commands):
        output = subprocess.PIPE if number else sys.stderr.fileno()
        done = subprocess.run(command, cwd=folder, stdout=output, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise FishError(f"`{' '.join(command[:3])}` failed with {done.returncode}; the files are in {folder}.")
    return str(done.stdout).strip()


def _template_command(go_text: str) -> str:
    try:
        return written("TEMPLATE", go_text)
    except ModelfileError as error:
        raise FishError(
            "this chat template cannot be written into a Modelfile; train with --template chatml."
        ) from error


def _tokenizer(model: MergedModel) -> Any:
    from mlx_fish.data.templates.tokenizer import load_tokenizer

    return load_tokenizer(ModelFolder(model.tokenizer_folder, model.name))


def _stops(generation: Mapping[str, Any], tokenizer: Any) -> list[str]:
    ends = generation.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [ends]
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in ids if isinstance(token, int)]


def _context(model: MergedModel) -> int:
    """Room for what training saw, 4096 tokens at least, and no more than the model has positions."""
    wanted = max(_LEAST_CONTEXT, 2 * (model.trained_length or 0))
    return min(int(model.config["max_position_embeddings"]), wanted)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
