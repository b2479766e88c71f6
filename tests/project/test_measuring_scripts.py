"""The programs that measure: each runs on the tiny model and tells what it promises."""

import json
import sys

import pytest
from paths import ROOT
from programs import run

pytestmark = pytest.mark.slow

sys.path.insert(0, str(ROOT / "benchmarks"))


def measured(tmp_path, script, *arguments):
    done = run(f"benchmarks/{script}", *arguments, "--json", "found.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tmp_path / "found.json").read_text())


def test_the_loss_is_as_near_to_float64_as_the_plain_one(tmp_path):
    table, records = measured(tmp_path, "loss_error.py", "--rows", "48")
    found = {(record["dtype"], record["way"]): record for record in records}
    assert len(found) == 4 and table.count("| bfloat16 |") == 2
    ours = found["float32", "single pass"]
    assert ours["mean_loss"] < 1e-5 and ours["row_loss"] < 1e-4 and ours["gradient"] < 1e-4
    ours, plain = found["bfloat16", "single pass"], found["bfloat16", "plain"]
    for name in ("mean_loss", "row_loss", "gradient"):
        assert ours[name] <= 1.05 * plain[name], (name, ours, plain)


def test_generate_beside_mlx_lm(tmp_path):
    table, record = measured(tmp_path, "bench_generate.py", "--tokens", "6", "--rounds", "1")
    assert record["equal_texts"] == 2
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in record["seconds"].values())
    assert "Beside mlx-lm: " in table and "16 at once beside one by one: " in table


def test_the_time_for_a_token_by_length(tmp_path):
    flags = ["--lengths", "16", "64", "--batch-tokens", "64", "--layers", "2", "--rounds", "1"]
    table, record = measured(tmp_path, "bench_length.py", *flags)
    short, long = record["lines"]
    assert (short["length"], long["length"]) == (16, 64) and len(table.splitlines()) == 4
    assert min(short["attention"], short["whole"]) > 0 and short["mflop"] < long["mflop"]
    assert run("benchmarks/bench_length.py", "--batch-tokens", "100", cwd=tmp_path).returncode == 2


def test_packed_beside_padded(tmp_path):
    table, record = measured(tmp_path, "bench_packing.py", "--sets", "short", "--layers", "1")
    packed, padded = record["lines"]
    assert packed["packing"] and not padded["packing"]
    assert packed["tokens"] == padded["tokens"], "the same rows"
    assert packed["computed"] < padded["computed"] and packed["shapes"] < padded["shapes"]
    assert min(packed["seconds"], padded["seconds"]) > 0 and "| short | packed |" in table


def test_a_profile_of_a_step(tmp_path):
    table, record = measured(tmp_path, "profile_step.py", "--length", "32", "--batch-size", "2", "--rounds", "1")
    assert len(record["seconds"]) == 10 and all(value > 0 for value in record["seconds"].values())
    assert "| whole step | 1 |" in table and "| sum of the parts |" in table


def test_the_first_update_is_timed(tmp_path):
    done = run("benchmarks/cold_start.py", "--rounds", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    marks = [float(line.split("|")[2].split()[0]) for line in done.stdout.splitlines()[2:6]]
    assert len(marks) == 4 and marks == sorted(marks)


def test_the_roofline_counts_the_tiny_model(tiny):
    from print_roofline import parts_of

    settings = {"supervised": 0.5, "batch_tokens": 64, "rank": 8, "width": 4}
    parts = {part.name: part for part in parts_of(tiny, length=32, **settings)}
    linear = 4 * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512)  # 4 blocks of q and o, k and v, the feed-forward layer
    assert parts["matrix products of the blocks"].flops == 4 * linear
    assert parts["head and loss, supervised rows only"].flops == 4 * 2560 * 192 * 0.5
    longer = {part.name: part for part in parts_of(tiny, length=64, **settings)}
    grown = {name for name, part in parts.items() if longer[name].flops != part.flops}
    assert grown == {"attention, the causal half"}
    assert longer["attention, the causal half"].flops == 2 * 4 * 6 * 192 * 32


def test_the_shapes_of_an_epoch_are_counted(tmp_path):
    done = run("benchmarks/batch_shapes.py", "--batch-size", "1", "313", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [line[:3] for line in lines] == [
        ["1", "yes", "313"],
        ["1", "no", "313"],
        ["313", "yes", "1"],
        ["313", "no", "1"],
    ]
    packed, padded = (float(line[3].rstrip("%")) for line in lines[2:])
    assert packed < 1 < padded  # one batch of all rows
    assert [line[4] for line in lines[2:]] == ["1", "1"] and int(lines[0][4]) > 1


@pytest.mark.parametrize("other", ["trainer", "mlx-lm", "mlx-lm-ours"])
def test_the_benchmark_measures_both_and_checks_that_they_agree(tmp_path, other):
    done = run(
        "benchmarks/bench.py", "--vs", other, "--updates", "5", "--rounds", "1", "--json", "bench.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "| ratio |" in done.stdout
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [run["system"] for run in record["runs"]] == ["mlx-fish", other]
    assert 0 <= record["agreement"] < 1e-5  # with mlx-lm's own mask it is 0.25
    for measured in record["runs"]:
        assert measured["tokens_per_second"] > 0 and measured["memory"] > 0 and len(measured["losses"]) == 3
        assert 0 <= measured["padding"] < 0.5


def test_the_benchmark_cuts_the_model_and_makes_rows_of_one_length(tmp_path):
    flags = ["--layers", "1", "--length", "32", "--batch-size", "2", "--grad-checkpoint"]
    command = ["--vs", "mlx-lm", "--updates", "4", "--rounds", "1", "--json", "bench.json", *flags]
    done = run("benchmarks/bench.py", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["agreement"] < 1e-5
    assert [run["padding"] for run in record["runs"]] == [pytest.approx(1 / 32)] * 2  # 31 of 32 positions predict
    assert "--layers 5" in run("benchmarks/bench.py", "--layers", "5", cwd=tmp_path).stderr
    assert "--backend mlx" in run("benchmarks/bench.py", "--vs", "mlx-lm", "--backend", "torch", cwd=tmp_path).stderr
