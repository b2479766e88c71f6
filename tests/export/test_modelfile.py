"""Our reader of the Modelfile grammar does what Ollama's does, and reads back everything that our writer writes."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fish.export.modelfile import Command, ModelfileError, read_modelfile, written

VECTORS = json.loads((Path(__file__).parent / "vectors" / "modelfile_parse.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_ollamas_own_parser(vector: dict[str, Any]) -> None:
    expected = vector["out"]
    if "error" in expected:
        with pytest.raises(ModelfileError) as caught:
            read_modelfile(vector["text"])
        assert str(caught.value) == expected["error"]
    else:
        found = [{"Name": command.name, "Args": command.args} for command in read_modelfile(vector["text"])]
        assert found == expected["commands"]


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from('ab "\n\r\t#{}\\你\u3000\u200b😀'), max_size=30))
def test_what_is_written_is_read_back_or_refused(value: str) -> None:
    try:
        text = written("SYSTEM", value)
    except ModelfileError:
        harmful = (
            '"""' in value or value.startswith('"') or value.endswith('"') or "\u3000" in value or "\u200b" in value
        )
        assert harmful or not value.strip() or value != value.strip() or "\r" in value
        return
    assert read_modelfile("FROM x\n" + text + "PARAMETER seed 1\n")[1:] == [
        Command("system", value),
        Command("seed", "1"),
    ]


@pytest.mark.parametrize("value", ['a """\nb', "你好\u3000世界", "zero\u200bwidth"])
def test_what_the_grammar_damages_is_refused(value: str) -> None:
    with pytest.raises(ModelfileError, match="SYSTEM cannot hold"):
        written("SYSTEM", value)


@pytest.mark.parametrize(
    "value", ["plain", "two\nlines", '"quoted"', " edges ", "你是一名观赏鱼医生。", "a # b", '{{ "x" }}']
)
def test_usual_values(value: str) -> None:
    assert read_modelfile("FROM x\n" + written("SYSTEM", value))[1] == Command("system", value)
