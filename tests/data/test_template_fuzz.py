"""Any conversation: decoding the supervised ids gives exactly the assistant's turns with their end tokens, or it is an error.

Also for templates of tokenizers that do not keep what came before: dropping earlier thoughts, trimming, numbering, reversing.
"""

import subprocess
import sys
import threading
import unicodedata

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlx_fish.data.examples import Example, Turn
from mlx_fish.data.templates import deadline
from mlx_fish.data.templates.builtin import BUILT_IN
from mlx_fish.data.templates.template import Template, TemplateTimeoutError, choose_template
from mlx_fish.errors import FishError

END = "<|im_end|>"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip) | st.sampled_from(
    [
        " 换水 ",
        "\n\n答",
        "<think>\n\n</think>",
        "{{ 7 * 7 }}",
        "{% raw %}",
        "### Response:\n",
        "User",
        "a\x00b",
        "e\u0301",
        "<|im_end",
        END,
    ]
)
CONVERSATION = st.tuples(st.booleans(), st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), TEXT)


def turns_of(with_system, pairs, system):
    turns = [Turn("system", system)] if with_system else []
    for question, answer in pairs:
        turns += [Turn("user", question), Turn("assistant", answer)]
    return tuple(turns)


def supervised(tokenizer, tokens):
    """Each supervised stretch, decoded."""
    stretches, last = [], False
    for token, learn in zip(tokens.ids.tolist(), tokens.supervised.tolist(), strict=True):
        if learn and not last:
            stretches.append([])
        if learn:
            stretches[-1].append(token)
        last = learn
    return [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in stretches]


def check(tokenizer, template, turns):
    """True: tokenised exactly. False: refused."""
    try:
        tokens = template.tokens(Example(turns, "a:1"), 4096)
    except FishError as error:
        assert str(error).startswith(("a:1: ", f"template {template.name} cannot render"))
        return False
    answers = [turn.content for turn in turns if turn.role == "assistant"]
    found = supervised(tokenizer, tokens)
    assert len(found) == len(answers)
    for text, answer in zip(found, answers, strict=True):
        assert text.endswith(template.end_token)
        assert text.removesuffix(template.end_token) in {nfc(answer), nfc(answer.strip())}
    return True


def nfc(text):
    """Qwen's tokenizers normalise to this form."""
    return unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("name", ["chat", *BUILT_IN])
def test_built_in_templates(tokenizer, name):
    template = Template(name, tokenizer)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(CONVERSATION)
    @example((True, [("问", "答"), ("再问", "<think>\n\n</think>再答")], "养鱼"))
    def run(conversation):
        turns = turns_of(*conversation)
        exact = check(tokenizer, template, turns)
        assert exact or any(END in turn.content for turn in turns)

    run()


LOOP = "{% for m in messages %}"
FOREIGN = {
    "drops earlier thoughts": LOOP
    + "<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] if not loop.last else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "trims": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "lowers": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content | lower }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "reverses": "{% for m in messages[::-1] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "counts": LOOP
    + "<|im_start|>{{ m.role }} {{ loop.index }}/{{ loop.length }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {{ messages|length + 1 }}/{{ messages|length + 1 }}\n{% endif %}",
    "adds an empty thought to the prompt": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    "only the last turn": "{{ messages[-1].content }}<|im_end|>",
    "ends twice": LOOP + "{{ m.content }}<|im_end|><|im_end|>{% endfor %}",
    "no end": LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_templates_that_change_what_came_before(tokenizer, name):
    """Exact or refused, never a guess; and the refusals happen."""
    template = Template("chatml", tokenizer)
    template.name, template.jinja = "chat", FOREIGN[name]
    outcomes = set()

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(CONVERSATION)
    @example((False, [("问", "<think>想</think>答"), ("再问", "再答")], "x"))
    @example((False, [("问", "Answer")], "x"))
    @example((False, [("Ask", "答"), ("再问", "再答")], "x"))
    def run(conversation):
        outcomes.add(check(tokenizer, template, turns_of(*conversation)))

    run()
    assert False in outcomes


ATTACKS = {
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "file": "{{ open('/etc/passwd').read() }}",
    "changing the messages": "{{ messages.append(1) }}{{ messages.clear() }}",
    "self": "{{ self.__init__.__globals__ }}{{ namespace.__init__.__globals__['os'].system('touch MARKER') }}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_template_reaches_no_file_and_no_attribute(tokenizer, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = Template("chatml", tokenizer)
    template.name, template.jinja = "chat", ATTACKS[name] + template.jinja
    turns = (Turn("user", "问"), Turn("assistant", "答"))
    try:
        text = template.prompt(turns[:1])
    except FishError as error:
        assert "cannot render this conversation" in str(error)
    else:
        assert "root:" not in text
        assert "class" not in text
    assert not list(tmp_path.iterdir())


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


def test_a_template_that_never_ends_is_given_up(tokenizer, tiny, monkeypatch):
    monkeypatch.setattr(deadline, "SECONDS", 0.2)
    own = type(tokenizer).from_pretrained(tiny.path)
    own.chat_template = ENDLESS.replace("99999", "3000") + own.chat_template
    running = set(threading.enumerate())
    for name in ("chat", "auto"):
        with pytest.raises(TemplateTimeoutError, match=r"template chat: it did not end within 0\.2 seconds"):
            choose_template(name, own, tiny)
    for thread in set(threading.enumerate()) - running:
        thread.join(timeout=20)
        assert not thread.is_alive(), "it would take turns from everything that follows"


@pytest.mark.process
def test_one_instruction_that_never_ends_ends_the_process():
    """9 ** 9 ** 9 holds Python's lock, so no thread of Python gets a turn."""
    import time

    code = "from mlx_fish.data.templates import deadline\ndeadline.HARD_SECONDS = 0.5\ndeadline.within(lambda: 9 ** 9 ** 9)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "Timeout (0:00:00.5" in done.stderr
    assert time.monotonic() - started < 250


@pytest.mark.process
def test_a_thread_that_is_done_does_not_lift_the_bound_of_another():
    """Two threads render; the second is done while the first still works, and then the first never ends."""
    program = """
import threading, time
from mlx_fish.data.templates import deadline
deadline.HARD_SECONDS = 1.0
first = threading.Thread(target=lambda: deadline.within(lambda: time.sleep(0.4) or 9 ** 9 ** 9))
first.start()
time.sleep(0.1)
deadline.within(lambda: None)
first.join()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Timeout (0:00:01" in done.stderr
