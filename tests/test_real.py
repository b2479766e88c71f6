"""On real weights of Qwen2-0.5B's shape: MLX_FISH_TEST_MODEL=FOLDER make test."""

import subprocess
import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, real_model):
    """A folder in which the model was converted, tuned for two updates and fused."""
    folder = tmp_path_factory.mktemp("real")
    commands = [
        ["convert", "--model", str(real_model.path.resolve()), "--out", "base", "--dtype", "float32"],
        [
            "train",
            "--model",
            "base",
            "--iters",
            "2",
            "--batch-size",
            "1",
            "--lora-rank",
            "2",
            "--learning-rate",
            "1e-3",
        ],
        ["fuse", "--to-hf", "--dtype", "float32"],
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_fish", *command], capture_output=True, text=True, cwd=folder, check=False
        )
        assert done.returncode == 0, done.stderr
    return folder


def test_the_converted_model_and_the_tuned_one_equal_transformers(run_folder, real_model):
    import torch
    from transformers import AutoModelForCausalLM

    from mlx_fish.data import Turn
    from mlx_fish.session import load_session

    session = load_session(model=str(run_folder / "base"), adapter=run_folder / "finetuned_model", no_adapter=False)
    ids = np.array(session.template.prompt_ids((Turn("user", "金鱼为什么容易浮头？"),)), np.int32)
    backend = session.load()
    tuned = backend.logits(ids)
    backend.use_adapter(False)
    base = backend.logits(ids)
    assert np.abs(tuned - base).max() > 1e-3
    for folder, ours in ((real_model.path, base), (run_folder / "fused_model", tuned)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            theirs = model(torch.tensor(ids[None]).long()).logits[0].numpy()
        assert np.abs(ours - theirs).max() < 1e-3
        assert (ours.argmax(-1) == theirs.argmax(-1)).all()


def test_ten_updates_take_the_same_course_on_both_backends(real_model):
    from mlx_fish.adapter import LoraSpec, choose_layers, initial_arrays
    from mlx_fish.backends import load_backend
    from mlx_fish.batches import Updates
    from mlx_fish.data import load_dataset
    from mlx_fish.template import choose_template, load_tokenizer

    template = choose_template("auto", load_tokenizer(real_model), real_model)
    rows = [template.tokens(example, 2048) for example in load_dataset("fish_care").splits["train"]]
    updates = Updates(rows, batch_size=1, accumulation=1, seed=42)
    spec = LoraSpec.uniform(choose_layers(real_model.linear_layers), rank=2, alpha=4)
    losses, adapters = {}, {}
    for name in ("mlx", "torch"):
        backend = load_backend(real_model, name=name)
        backend.attach(spec, initial_arrays(spec, 42))
        losses[name] = [backend.step(updates[step], 2e-4, [0])().loss for step in range(10)]
        adapters[name] = backend.adapter_arrays()
        del backend  # one model's weights at a time
    print(losses)
    np.testing.assert_allclose(losses["mlx"], losses["torch"], rtol=1e-3)
    for key, array in adapters["mlx"].items():
        assert np.linalg.norm(array - adapters["torch"][key]) < 1e-2 * np.linalg.norm(array)
