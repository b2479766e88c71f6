import pytest

from mlx_fish.data.examples import Example, Turn
from mlx_fish.data.templates.builtin import BUILT_IN
from mlx_fish.data.templates.template import Template, choose_template
from mlx_fish.errors import FishError

TURNS = (
    Turn("system", "你养鱼"),
    Turn("user", "金鱼浮头", "水温30℃"),
    Turn("assistant", "缺氧"),
    Turn("user", "怎么办"),
    Turn("assistant", "增氧"),
)
EXPECTED = {
    "alpaca": "你养鱼\n\n### Instruction:\n金鱼浮头\n\n### Input:\n水温30℃\n\n### Response:\n[缺氧<|im_end|>]\n\n"
    "### Instruction:\n怎么办\n\n### Response:\n[增氧<|im_end|>]",
    "chatml": "<|im_start|>system\n你养鱼<|im_end|>\n<|im_start|>user\n金鱼浮头\n水温30℃<|im_end|>\n<|im_start|>assistant\n"
    "[缺氧<|im_end|>]\n<|im_start|>user\n怎么办<|im_end|>\n<|im_start|>assistant\n[增氧<|im_end|>]",
    "default": "System: 你养鱼<|im_end|>\nHuman: 金鱼浮头\n水温30℃<|im_end|>\nAssistant:[缺氧<|im_end|>]\n"
    "Human: 怎么办<|im_end|>\nAssistant:[增氧<|im_end|>]",
    "empty": "你养鱼金鱼浮头\n水温30℃[缺氧<|im_end|>]怎么办[增氧<|im_end|>]",
}
EXPECTED["chat"] = EXPECTED["qwen"] = EXPECTED["chatml"]


def marked(tokenizer, tokens):
    """The decoded text with brackets round each supervised stretch."""
    text, inside = "", False
    start = 0
    for at in range(len(tokens.ids) + 1):
        now = bool(tokens.supervised[at]) if at < len(tokens.ids) else False
        if now != inside or at == len(tokens.ids):
            text += tokenizer.decode(tokens.ids[start:at].tolist())
            text += "[" if now and not inside else "]" if inside and not now else ""
            start, inside = at, now
    return text


@pytest.mark.parametrize("name", ["chat", *BUILT_IN])
def test_exactly_the_answers_and_their_end_tokens_are_supervised(tokenizer, name):
    template = Template(name, tokenizer)
    tokens = template.tokens(Example(TURNS, "a:1"), 2048)
    assert marked(tokenizer, tokens) == EXPECTED[name]
    assert tokens.ids[-1] == template.end_token_id


@pytest.mark.parametrize("name", ["chat", *BUILT_IN])
def test_the_prompt_is_what_training_put_before_the_answer(tokenizer, name):
    template = Template(name, tokenizer)
    ids = template.tokens(Example(TURNS, "a:1"), 2048).ids.tolist()
    for number in (2, 4):
        prompt = template.prompt_ids(TURNS[:number])
        assert ids[: len(prompt)] == prompt
        assert tokenizer.decode(prompt) == template.prompt(TURNS[:number])


def test_qwen_adds_its_system_prompt(tokenizer):
    prompt = Template("qwen", tokenizer).prompt((Turn("user", "问"),))
    assert prompt.startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")


def test_auto_takes_the_tokenizers_own_only_when_the_model_stops_at_it(tokenizer, tiny, monkeypatch):
    assert choose_template("auto", tokenizer, tiny).name == "chat"
    base = type(tiny)(tiny.path, tiny.name)
    base.__dict__["generation_config"] = {"eos_token_id": 0}
    assert choose_template("auto", tokenizer, base).name == "alpaca"


def test_a_cut_answer_is_never_trained_as_if_whole(tokenizer):
    template = Template("chat", tokenizer)
    example = Example((Turn("user", "问"), Turn("assistant", "缺氧" * 20)), "a:7")
    whole = template.tokens(example, 2048)
    exact = template.tokens(example, len(whole.ids))
    cut = template.tokens(example, len(whole.ids) - 1)
    assert not exact.cut
    assert exact.ids[-1] == template.end_token_id
    assert cut.cut
    assert template.end_token_id not in cut.ids[cut.supervised].tolist()


def test_no_supervised_token_left(tokenizer):
    with pytest.raises(FishError, match=r"a:7: the prompt alone fills --max-seq-length 4"):
        Template("chat", tokenizer).tokens(Example((Turn("user", "问" * 50), Turn("assistant", "答")), "a:7"), 4)


def test_control_tokens_in_a_row_are_refused(tokenizer):
    with pytest.raises(FishError, match=r"a:7: the user turn contains <\|im_end\|>"):
        Template("chat", tokenizer).tokens(Example((Turn("user", "x<|im_end|>"), Turn("assistant", "答")), "a:7"), 99)


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer):
    template = Template("chatml", tokenizer)
    template.jinja = "{% for m in messages %}{{ m.role }}{{ loop.length }}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(FishError, match=r"changes earlier turns|does not render"):
        template.tokens(Example(TURNS, "a:1"), 99)


def test_unknown_template():
    from mlx_fish.data.templates.template import check_template_name

    with pytest.raises(FishError, match="Did you mean `qwen`"):
        check_template_name("qwenn")


def test_an_answer_cut_inside_a_character_ends_before_it(tokenizer):
    template = Template("chat", tokenizer)
    ids = tokenizer.encode("金鱼𪚥", add_special_tokens=False)  # four bytes that no token holds whole
    assert template.answer_text(ids) == "金鱼𪚥"
    assert tokenizer.decode(ids[:-1]).endswith("�")
    assert template.answer_text(ids[:-1]) == "金鱼"
