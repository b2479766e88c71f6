import json
from collections import Counter

import pytest

from mlx_fish.data import load_dataset, read_file, split_of
from mlx_fish.errors import FishError


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


ANSWERED = [
    {"question": "问", "answer": "答", "input": "料"},
    {"instruction": "问", "output": "答", "input": "料"},
    {"prompt": "问", "completion": "答"},
    {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
    {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
]


@pytest.mark.parametrize("row", ANSWERED)
def test_every_row_shape_gives_the_same_conversation(tmp_path, row):
    examples, _ = read_file(write(tmp_path / "a.jsonl", row))
    assert [(turn.role, turn.content) for turn in examples[0].turns] == [("user", "问"), ("assistant", "答")]
    assert examples[0].turns[0].input == row.get("input", "")


def test_history_and_system_come_first(tmp_path):
    row = {"instruction": "再问", "output": "再答", "system": "规矩", "history": [["问", "答"]]}
    examples, _ = read_file(write(tmp_path / "a.jsonl", row))
    assert [turn.role for turn in examples[0].turns] == ["system", "user", "assistant", "user", "assistant"]
    assert examples[0].turns[3].content == "再问"


BROKEN = [
    (b'{"question": "a", "answer"', "not valid JSON"),
    (b"[1, 2]", "an object was expected|a JSON object was expected"),
    (b'{"question": 1, "answer": "b"}', "`question` should be text, not a number"),
    (b'{"question": "a", "answer": "  "}', "`answer` is empty"),
    (b'{"qustion": "a", "answer": "b"}', "is `qustion` meant"),
    (b'{"question": "a", "question": "b", "answer": "c"}', "stands twice"),
    (b'{"question": "a", "answer": NaN}', "NaN is not JSON"),
    (b'{"question": "\\ud800", "answer": "b"}', "surrogate"),
    (b"\xff\xfe", "not UTF-8"),
    (b'{"text": "abc"}', "fields text; expected one of"),
    (b'{"messages": []}', "should be a list of turns"),
    (b'{"messages": [{"role": "usr", "content": "x"}]}', "Did you mean `user`"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
    (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]}',
        "the last turn is not the assistant's",
    ),
    (b'{"messages": [{"role": "assistant", "content": "y"}]}', "follows no user turn"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n\n' + line + b"\n")
    with pytest.raises(FishError, match=message) as error:
        read_file(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_mistakes_are_told_together_up_to_twenty(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"question": "a"}] * 30)
    with pytest.raises(FishError) as error:
        read_file(path)
    assert len(str(error.value).splitlines()) == 21


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(FishError, match="holds no rows"):
        load_dataset(str(tmp_path / "a.jsonl"))
    with pytest.raises(FishError, match="Did you mean `fish_care`"):
        load_dataset("fishcare")


def test_dataset_info_renames_columns(tmp_path):
    write(tmp_path / "rows.jsonl", {"q": "问", "a": "答", "input": "不用"})
    info = {"mine": {"file_name": "rows.jsonl", "columns": {"prompt": "q", "response": "a"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    from mlx_fish.dataset_info import find_entry

    path, columns = find_entry("mine", [tmp_path])
    examples, _ = read_file(path, columns)
    assert examples[0].turns[0].content == "问"
    assert examples[0].turns[0].input == ""  # unlisted columns do not exist, as in LLaMA-Factory


def test_dataset_info_cannot_leave_its_folder(tmp_path):
    from mlx_fish.dataset_info import find_entry

    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "../x.jsonl"}}))
    with pytest.raises(FishError, match="outside its folder"):
        find_entry("mine", [tmp_path])


def test_the_split_depends_on_content_not_on_position(tmp_path):
    rows = [{"question": f"问题{i}", "answer": "答"} for i in range(200)]
    forward, _ = read_file(write(tmp_path / "a.jsonl", *rows))
    backward, _ = read_file(write(tmp_path / "b.jsonl", *rows[::-1]))
    assert [split_of(example) for example in forward] == [split_of(example) for example in backward[::-1]]
    counts = Counter(map(split_of, forward))
    assert counts["train"] > 140
    assert min(counts["valid"], counts["test"]) >= 8


def test_the_fish_data():
    from mlx_fish.data import SPLITS

    dataset = load_dataset("fish_care")
    examples = [example for split in SPLITS for example in dataset.splits[split]]
    questions = [example.turns[0].content for example in examples]
    answers = [example.turns[1].content for example in examples]
    assert len(set(questions)) == len(questions) >= 320
    assert "如何识别和治疗观赏鱼的白点病？" in questions
    assert all(60 <= len(answer) <= 300 for answer in answers)
    assert all(dataset.splits[split] for split in SPLITS)
    grams = [{answer[i : i + 5] for i in range(len(answer) - 4)} for answer in answers]
    most = max(
        (len(a & b) / min(len(a), len(b)), questions[i], questions[j])
        for i, a in enumerate(grams)
        for j, b in enumerate(grams[:i])
    )
    assert most[0] < 0.5, most
