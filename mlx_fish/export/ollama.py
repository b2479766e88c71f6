"""Write the Modelfile for `ollama create`: chat template, system prompt, stop strings and sampling parameters.

The Modelfile sets everything explicitly. Ollama's guesses are wrong for a tuned model, and a wrong template
or stop string is the most frequent complaint. Independent of how the GGUF files are written.
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
_MIN_CONTEXT = 4096
# Key of generation_config.json -> PARAMETER.
_SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def check_name(name: str) -> None:
    """Check that a name is valid for an Ollama model.

    Raises:
        FishError: the name is invalid.
    """
    if not _NAME.fullmatch(name):
        raise FishError(
            f"--to-ollama {name}: expected a name of lower-case letters, digits and . _ -, such as fish or me/fish:v1."
        )


def check_ollama() -> None:
    """Check, before any work, that `--create` can run `ollama`.

    Raises:
        FishError: `ollama` is not installed.
    """
    if shutil.which("ollama") is None:
        raise FishError(
            "--create needs `ollama` on the PATH, but it was not found; install it, or drop --create and create the "
            "model later."
        )


def write_modelfile(
    folder: Path, model: MergedModel, *, name: str, file_name: str, adapter_name: str | None = None
) -> None:
    """Write `Modelfile` into the folder of the GGUF files.

    Args:
        name: the model's name in Ollama.
        file_name: the GGUF file of the model, in `folder`.
        adapter_name: the GGUF file of the adapter, in `folder`, if it is not merged.

    Raises:
        FishError: there is no chat template, or an Ollama TEMPLATE cannot express it.
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
        except ModelfileError:  # TEMPLATE can express any text, since Go strings have escapes
            go_text, command = (
                template.text(system=system),
                "# The system prompt is in the TEMPLATE: SYSTEM cannot hold it.\n",
            )
        lines.append(command)
    lines.append(_template_command(go_text))
    lines += [
        written(f"PARAMETER {key}", value)
        for key, value in parameters(generation, _stop_strings(generation, tokenizer))
    ]
    lines.append(written("PARAMETER num_ctx", str(_context_length(model))))
    if model.license:
        lines.append(written("LICENSE", model.license))
    write_text(folder / "Modelfile", "".join(lines))


def template_of(model: MergedModel, tokenizer: Any) -> GoTemplate:
    """Return the Go form of the chat template that the model was tuned with.

    Args:
        tokenizer: the model's transformers tokenizer, which renders the Jinja template.

    Raises:
        FishError: there is no chat template, or an Ollama TEMPLATE cannot express it.
    """
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
        except Exception as error:  # Jinja's errors, and those that a template raises itself
            raise FishError(f"the chat template cannot render a conversation ({error}).") from error
        return text

    bos = tokenizer.bos_token
    adds_bos = bos and tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
    return go_template(render, bos=bos if adds_bos else "")


def parameters(generation: Mapping[str, Any], stops: Sequence[str]) -> list[tuple[str, str]]:
    """Return the PARAMETER lines for a generation config, as (name, value).

    As in transformers, decoding is greedy unless the config enables sampling.
    """
    lines = [("stop", stop) for stop in stops]
    if generation.get("do_sample"):
        lines += [
            (name, _number_text(generation[key])) for key, name in _SAMPLING.items() if generation.get(key) is not None
        ]
        if generation.get("temperature") is None:
            lines.append(("temperature", "1"))  # transformers' default; Ollama's is 0.8
    else:
        lines.append(("temperature", "0"))
    penalty = generation.get("repetition_penalty")
    if penalty is not None and penalty != 1:
        # -1 is the complete context, as in transformers; Ollama's default is the last 64 tokens.
        lines += [("repeat_penalty", _number_text(penalty)), ("repeat_last_n", "-1")]
    if generation.get("max_new_tokens"):
        lines.append(("num_predict", _number_text(generation["max_new_tokens"])))
    return lines


def create_model(folder: Path, name: str, question: str) -> str:
    """Run `ollama create` with its progress on stderr, ask the new model one question, and return its answer.

    Raises:
        FishError: `ollama` is not installed, or one of its commands failed.
    """
    check_ollama()
    import sys

    commands = [["ollama", "create", name, "-f", "Modelfile"], ["ollama", "run", name, question]]
    for index, command in enumerate(commands):
        output = subprocess.PIPE if index else sys.stderr.fileno()
        result = subprocess.run(command, cwd=folder, stdout=output, text=True, stdin=subprocess.DEVNULL, check=False)
        if result.returncode:
            raise FishError(
                f"`{' '.join(command[:3])}` failed with {result.returncode}; the exported files are in {folder}."
            )
    return str(result.stdout).strip()


def _template_command(go_text: str) -> str:
    try:
        return written("TEMPLATE", go_text)
    except ModelfileError as error:
        raise FishError(
            "this chat template cannot be expressed in a Modelfile; train with --template chatml."
        ) from error


def _tokenizer(model: MergedModel) -> Any:
    from mlx_fish.data.templates.tokenizer import load_tokenizer

    return load_tokenizer(ModelFolder(model.tokenizer_folder, model.name))


def _stop_strings(generation: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """Return the end tokens of a generation config as strings."""
    ends = generation.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [ends]
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in ids if isinstance(token, int)]


def _context_length(model: MergedModel) -> int:
    """Return the context length in tokens: twice the training length, at least 4096, within the model's maximum."""
    desired = max(_MIN_CONTEXT, 2 * (model.trained_length or 0))
    return min(int(model.config["max_position_embeddings"]), desired)


def _number_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
