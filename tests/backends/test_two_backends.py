"""MLX and torch beside each other: the same start, the same course, and a run that moves from one to the other."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mlx_fish.adapters.spec import AdapterSpec, choose_layers, initial_arrays
from mlx_fish.backends.choose import load_backend
from mlx_fish.backends.protocol import Sampling, optimizer_step
from mlx_fish.data.dataset import load_dataset
from mlx_fish.data.examples import Turn
from mlx_fish.data.order import Updates
from mlx_fish.data.templates.template import choose_template
from mlx_fish.training.schedule import learning_rate

pytestmark = pytest.mark.slow

ROOT_SCRIPT = "tools/loss_compare.py"


@pytest.fixture(scope="module")
def updates(tiny, tokenizer):
    template = choose_template("auto", tokenizer, tiny)
    rows = [template.tokens(example, 2048) for example in load_dataset("fish_care").splits["train"]]
    return Updates(rows, batch_size=2, accumulation=2, seed=3)


@pytest.fixture(scope="module")
def spec(tiny):
    return AdapterSpec.uniform(choose_layers(tiny.linear_layers), rank=8, alpha=16)


def train(backend, updates, steps, total):
    """The losses of updates `steps` of a run of `total`, by the schedule that `train` follows."""
    found = []
    for step in steps:
        rate = learning_rate(step, peak=1e-3, total=total, warmup=2, schedule="cosine")
        batches = updates[step]
        found.append(optimizer_step(backend, batches, rate, [0] * len(batches))().loss)
    return found


def started(tiny, spec, name):
    backend = load_backend(tiny, name=name)
    backend.attach(spec, initial_arrays(spec, 42))
    return backend


def furthest(arrays, others):
    """The largest relative distance of a matrix, in the 2-norm."""
    assert arrays.keys() == others.keys()
    return max(
        float(np.linalg.norm(array - others[key]) / max(np.linalg.norm(array), 1e-12)) for key, array in arrays.items()
    )


def test_fifty_updates_take_the_same_course(tiny, spec, updates):
    mlx, torch = started(tiny, spec, "mlx"), started(tiny, spec, "torch")
    a, b = (train(backend, updates, range(50), 50) for backend in (mlx, torch))
    assert sum(a[-10:]) < sum(a[:10])
    np.testing.assert_allclose(a, b, rtol=1e-4)
    assert furthest(mlx.adapter_arrays(), torch.adapter_arrays()) < 1e-3
    assert furthest(initial_arrays(spec, 42), torch.adapter_arrays()) > 1e-2, "it moved, or nothing was compared"


@pytest.mark.parametrize(("first", "second"), [("mlx", "torch"), ("torch", "mlx")])
def test_five_updates_here_and_five_there_are_ten(tiny, spec, updates, first, second):
    straight = started(tiny, spec, second)
    expected = train(straight, updates, range(10), 10)
    begun = started(tiny, spec, first)
    losses = train(begun, updates, range(5), 10)
    continued = load_backend(tiny, name=second)
    continued.attach(spec, begun.adapter_arrays())
    continued.restore_optimizer(begun.optimizer_arrays(), 5)
    losses += train(continued, updates, range(5, 10), 10)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert furthest(straight.adapter_arrays(), continued.adapter_arrays()) < 1e-3
    forgetful = load_backend(tiny, name=second)
    forgetful.attach(spec, begun.adapter_arrays())
    train(forgetful, updates, range(5, 10), 10)
    assert furthest(straight.adapter_arrays(), forgetful.adapter_arrays()) > 1e-2, "the moments matter"


def test_both_answer_alike(tiny, spec, updates, tokenizer):
    template = choose_template("auto", tokenizer, tiny)
    prompts = [template.prompt_ids((Turn("user", text),)) for text in ("金鱼浮头", "新手适合养什么鱼？", "换水")]
    mlx = started(tiny, spec, "mlx")
    train(mlx, updates, range(5), 5)
    torch = load_backend(tiny, name="torch")
    torch.attach(spec, mlx.adapter_arrays())
    sampling = Sampling(24, repetition_penalty=1.2)
    answers = [backend.generate_batch(prompts, sampling, [template.end_token_id]) for backend in (mlx, torch)]
    assert answers[0] == answers[1]


def test_an_adapter_of_either_is_read_by_the_other(tmp_path):
    """By the commands: train on one, evaluate and fuse on the other; the curves agree by tools/loss_compare.py."""
    figures, fused = {}, {}
    for name, other in (("mlx", "torch"), ("torch", "mlx")):
        run(tmp_path, "train", "--model", "tiny", "--iters", "6", "--backend", name, "--output-dir", name)
        settings = json.loads((tmp_path / name / "run.json").read_text())
        assert settings["results"]["backend"]["name"] == name
        for reader in (name, other):
            done = run(tmp_path, "evaluate", "--json", "--adapter", name, "--backend", reader)
            figures[name, reader] = json.loads(done.stdout)["loss"]
            assert f"computing with {reader} on " in done.stderr
        run(tmp_path, "fuse", "--to-hf", "--adapter", name, "--out", f"fused-{name}")
        fused[name] = tmp_path / f"fused-{name}"
    np.testing.assert_allclose(list(figures.values()), figures["mlx", "mlx"], rtol=1e-5)
    compared = compare(tmp_path / "mlx", tmp_path / "torch")
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "6 values" in compared.stdout
    run(tmp_path, "train", "--model", "tiny", "--iters", "6", "--learning-rate", "3e-4", "--output-dir", "another")
    compared = compare(tmp_path / "mlx", tmp_path / "another")
    assert compared.returncode == 1
    assert "DIFFERS" in compared.stdout


def run(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "mlx_fish", *arguments], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def compare(a, b):
    from paths import ROOT

    command = [sys.executable, str(ROOT / ROOT_SCRIPT), str(a), str(b)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
