"""Built-in prompt templates, as Jinja chat templates."""

from dataclasses import dataclass

QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
_QWEN = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\n" + QWEN_SYSTEM + "<|im_end|>\n' -}}"
    "{%- endif -%}" + _CHATML
)
_BY_ROLE = (
    "{{- BOS -}}{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- SYSTEM -}}"
    "{%- elif message['role'] == 'user' -%}{{- USER -}}"
    "{%- else -%}{{- ASSISTANT -}}{%- endif -%}"
    "{%- endfor -%}"
)
_CONTENT = "message['content']"


@dataclass(frozen=True)
class BuiltIn:
    """A built-in prompt template.

    Attributes:
        jinja: the template, with the placeholders EOS and BOS for the tokenizer's special tokens.
        end_token: the token that ends an answer. Empty: the tokenizer's EOS.
        input_joiner: separator between a question and its additional input.
    """

    jinja: str
    end_token: str = ""
    input_joiner: str = "\n"


def _by_role(*, system: str, user: str, assistant: str) -> str:
    """Return a template that renders each message with the Jinja expression of its role."""
    return _BY_ROLE.replace("SYSTEM", system).replace("USER", user).replace("ASSISTANT", assistant)


BUILT_IN = {
    "alpaca": BuiltIn(
        _by_role(
            system=rf"{_CONTENT} + '\n\n'",
            user=rf"'### Instruction:\n' + {_CONTENT} + '\n\n### Response:\n'",
            assistant=rf"{_CONTENT} + EOS + '\n\n'",
        ),
        input_joiner="\n\n### Input:\n",
    ),
    "qwen": BuiltIn(_QWEN, end_token="<|im_end|>"),
    "chatml": BuiltIn(_CHATML, end_token="<|im_end|>"),
    "default": BuiltIn(
        _by_role(
            system=rf"'System: ' + {_CONTENT} + EOS + '\n'",
            user=rf"'Human: ' + {_CONTENT} + EOS + '\nAssistant:'",
            assistant=rf"{_CONTENT} + EOS + '\n'",
        )
    ),
    "empty": BuiltIn(_by_role(system=_CONTENT, user=_CONTENT, assistant=f"{_CONTENT} + EOS")),
}
