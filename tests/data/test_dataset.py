import hashlib
import json
import re
import tracemalloc
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_fish.data.dataset import load_dataset, split_of
from mlx_fish.data.formats.dataset_info import find_entry
from mlx_fish.errors import FishError


def read_file(path):
    """The examples of one file, in its order, and its sha256."""
    dataset = load_dataset(str(path))
    rows = [example for split in dataset.splits.values() for example in split]
    return sorted(rows, key=lambda example: int(re.split(r"\D", example.where)[-1])), dataset.hashes[path.name]


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
    (b'{"qustion": "a", "answer": "b"}', "misspelled as `qustion`"),
    (b'{"question": "a", "question": "b", "answer": "c"}', "appears twice"),
    (b'{"question": "a", "answer": NaN}', "NaN is not JSON"),
    (b'{"question": "\\ud800", "answer": "b"}', "surrogate"),
    (b"\xff\xfe", "not UTF-8"),
    (b'{"text": "abc"}', "`text` alone is a document"),
    (b'{"messages": []}', "should be a list of turns"),
    (b'{"messages": [{"role": "usr", "content": "x"}]}', "Did you mean `user`"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
    (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]}',
        "the last turn is not the assistant's",
    ),
    (b'{"messages": [{"role": "assistant", "content": "y"}]}', "does not follow a user turn"),
    (b"42", "a JSON object was expected, not a number"),
    (b'"question"', "a JSON object was expected, not text"),
    (b"null", "a JSON object was expected, not null"),
    (b"true", "a JSON object was expected, not true/false"),
    (b"{}", "expected one of: question/answer"),
    (b'{"question": "a", "answer": "b",}', "not valid JSON"),
    (b"{'question': 'a', 'answer': 'b'}", "not valid JSON"),
    (b'{"question": "a", "answer": "b"}{"question": "a", "answer": "b"}', "not valid JSON: Extra data"),
    (b'\xef\xbb\xbf{"question": "a", "answer": "b"}', "not valid JSON: Unexpected UTF-8 BOM"),
    ('{"question": "a", "answer": "b"}'.encode("utf-16"), "not UTF-8"),
    (b'{"question": "a", "answer": "\xe9\xb1"}', "not UTF-8"),
    (b'{"question": "a", "answer": -Infinity}', "-Infinity is not JSON"),
    (b'{"question": "a", "answer": ' + b"7" * 5000 + b"}", "thousands of digits"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"question": "a", "answer": null}', "`answer` should be text, not null"),
    (b'{"question": "a", "answer": ["b"]}', "`answer` should be text, not an array"),
    (b'{"question": "", "answer": "b"}', "`question` is empty"),
    (b'{"question": "a", "answer": "b", "input": 3}', "`input` should be text, not a number"),
    (b'{"instruction": "a", "output": "b", "history": [["x"]]}', "list of .question, answer. pairs"),
    (b'{"instruction": "a", "output": "b", "history": [["x", ""]]}', "list of .question, answer. pairs"),
    (
        b'{"instruction": "a", "output": "b", "history": [["x", "\\udfff"]]}',
        "`history` contains half of a surrogate pair",
    ),
    (b'{"messages": "hello"}', "should be a list of turns, not text"),
    (b'{"messages": ["hello"]}', "turn 1 is text; an object was expected"),
    (b'{"messages": [{"content": "x"}]}', "turn 1 has the unknown role None"),
    (b'{"messages": [{"role": "user", "contents": "x"}]}', "turn 1: `content` is missing .misspelled as `contents`"),
    (b'{"messages": [{"role": "user", "content": null}]}', "turn 1: `content` should be text, not null"),
    (
        b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        "turn 1: `content` should be text, not an array",
    ),
    (b'{"messages": [{"role": "tool", "content": "x"}]}', "unknown role 'tool'"),
    (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}]}',
        "two user turns in a row",
    ),
    (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "s"}, {"role": "assistant", "content": "z"}]}',
        "a system turn after the start",
    ),
    (b'{"conversations": [{"from": "bot", "value": "x"}]}', "unknown from 'bot'"),
    (b'{"question": "a", "answer": "' + b"x" * (10 << 20) + b'"}', "longer than 4 MB"),
]
assert len({words for _, words in BROKEN}) > 30


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
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "… and 10 more"


def test_mistakes_of_all_files_of_a_folder_are_told_together(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with pytest.raises(FishError, match=r"train.jsonl:2: (.|\n)*valid.jsonl:2: "):
        load_dataset(str(tmp_path))


def test_good_rows_of_all_kinds(tmp_path):
    """A byte order mark, Windows' line ends, blank lines, no line end after the last row."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": "b"}\r\n\r\n  \n{"question": "c", "answer": "d"}')
    assert [example.where for example in read_file(path)[0]] == [f"{path}:1", f"{path}:4"]


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [b'{"question": "a%d", "answer": "b"}' % number for number in range(40)]
    path.write_bytes(
        b"\n".join([*rows, *(line.replace(b"\n", b"") for line, _ in BROKEN), b'{"question": "z", "answer": "y"}'])
    )
    dataset = load_dataset(str(path), skip_bad_rows=True)
    assert sum(len(rows) for rows in dataset.splits.values()) == 41
    assert dataset.skipped.count == len(BROKEN)
    assert len(dataset.skipped.first) == 20
    assert dataset.hashes == {"a.jsonl": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.write_bytes(b"{\n" * 3)
    with pytest.raises(FishError, match="contains no usable rows"):
        load_dataset(str(path), skip_bad_rows=True)


def test_a_huge_line_takes_little_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"question": "a", "answer": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"question": "a", "answer": "b"}\n')
    tracemalloc.start()
    dataset = load_dataset(str(path), skip_bad_rows=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert dataset.skipped.first == [f"{path}:1: the line is longer than 4 MB; one row per line was expected"]
    assert sum(map(len, dataset.splits.values())) == 1


def test_a_huge_array_is_refused_unread(tmp_path):
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(FishError, match="larger than 256 MB"):
        load_dataset(str(path))


@pytest.mark.parametrize(
    "name", ["../secret.jsonl", "/etc/passwd", "link.jsonl", "a\0b", "x" * 5000, "x/" * 3000, "\ud800"]
)
def test_a_data_sets_file_stays_in_its_folder(tmp_path, name):
    (tmp_path / "secret.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": name}}))
    with pytest.raises(FishError, match="outside its folder|not a valid path|does not exist"):
        find_entry("mine", [folder], required=())


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x" * 5000, "\ud800", "../" * 2000])
def test_names_that_no_file_can_have(name):
    with pytest.raises(FishError):
        load_dataset(name)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
KEYS = "question answer input instruction output history system prompt completion messages conversations role content from value"
ROW = st.dictionaries(
    st.sampled_from(KEYS.split()), JSON | st.lists(st.dictionaries(st.sampled_from(KEYS.split()), JSON)), max_size=5
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.binary(max_size=60) | (JSON | ROW).map(lambda row: json.dumps(row).encode("utf-8", "surrogatepass")),
        max_size=6,
    )
)
def test_any_file_is_read_or_refused_line_by_line(tmp_path, lines):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        examples, _ = read_file(path)
    except FishError as error:
        assert all(
            line.startswith((f"{path}:", "… and ", f"{path} contains no rows")) for line in str(error).splitlines()
        )
        return
    for example in examples:
        assert example.turns[-1].role == "assistant"
        assert all(turn.content.strip() for turn in example.turns)


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(FishError, match="contains no rows"):
        load_dataset(str(tmp_path / "a.jsonl"))
    with pytest.raises(FishError, match="Did you mean `fish_care`"):
        load_dataset("fishcare")


def test_dataset_info_renames_columns(tmp_path):
    write(tmp_path / "rows.jsonl", {"q": "问", "a": "答", "input": "不用"})
    info = {"mine": {"file_name": "rows.jsonl", "columns": {"prompt": "q", "response": "a"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    splits = load_dataset("mine", found_at=tmp_path / "dataset_info.json").splits
    examples = [example for split in splits.values() for example in split]
    assert examples[0].turns[0].content == "问"
    assert examples[0].turns[0].input == ""  # unlisted columns do not exist, as in LLaMA-Factory


def test_dataset_info_cannot_leave_its_folder(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "../x.jsonl"}}))
    with pytest.raises(FishError, match="outside its folder"):
        find_entry("mine", [tmp_path], required=())


def test_the_split_depends_on_content_not_on_position(tmp_path):
    rows = [{"question": f"问题{i}", "answer": "答"} for i in range(200)]
    forward, _ = read_file(write(tmp_path / "a.jsonl", *rows))
    backward, _ = read_file(write(tmp_path / "b.jsonl", *rows[::-1]))
    assert [split_of(example) for example in forward] == [split_of(example) for example in backward[::-1]]
    counts = Counter(map(split_of, forward))
    assert counts["train"] > 140
    assert min(counts["valid"], counts["test"]) >= 8


def test_the_fish_data():
    from mlx_fish.data.dataset import SPLITS

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
