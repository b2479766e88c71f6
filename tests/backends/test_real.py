"""On real weights of Qwen2-0.5B's shape: MLX_FISH_TEST_MODEL=FOLDER make test."""

import re
import subprocess
import sys

import numpy as np
import pytest

from mlx_fish.backends.choose import VARIABLE
from mlx_fish.backends.protocol import optimizer_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def computing_with_mlx():
    """Whatever suits the machine: transformers, with which MLX is compared here, computes with torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "mlx")
        yield


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

    from mlx_fish.data.examples import Turn
    from mlx_fish.inference.session import load_session

    session = load_session(model=str(run_folder / "base"), adapter=run_folder / "finetuned_model", no_adapter=False)
    ids = np.array(session.template.prompt_ids((Turn("user", "金鱼为什么容易浮头？"),)), np.int32)
    backend = session.load()
    assert backend.name == "mlx"
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
    from mlx_fish.adapters.spec import AdapterSpec, choose_layers, initial_arrays
    from mlx_fish.backends.choose import load_backend
    from mlx_fish.data.dataset import load_dataset
    from mlx_fish.data.order import Updates
    from mlx_fish.data.templates.template import choose_template
    from mlx_fish.data.templates.tokenizer import load_tokenizer

    template = choose_template("auto", load_tokenizer(real_model), real_model)
    rows = [template.tokens(example, 2048) for example in load_dataset("fish_care").splits["train"]]
    updates = Updates(rows, batch_size=1, accumulation=1, seed=42)
    spec = AdapterSpec.uniform(choose_layers(real_model.linear_layers), rank=2, alpha=4)
    losses, adapters = {}, {}
    for name in ("mlx", "torch"):
        backend = load_backend(real_model, name=name)
        backend.attach(spec, initial_arrays(spec, 42))
        losses[name] = [optimizer_step(backend, updates[step], 2e-4, [0])().loss for step in range(10)]
        adapters[name] = backend.adapter_arrays()
        del backend  # one model's weights at a time
    print(losses)
    np.testing.assert_allclose(losses["mlx"], losses["torch"], rtol=1e-3)
    # The adapters as wholes: AdamW's first steps depend on a gradient's sign, which rounding decides where it is nearly zero.
    mlx, torch = (np.concatenate([array.ravel() for array in adapters[name].values()]) for name in ("mlx", "torch"))
    print("adapters differ by", np.linalg.norm(mlx - torch) / np.linalg.norm(mlx))
    assert np.linalg.norm(mlx - torch) < 1e-2 * np.linalg.norm(mlx)


def test_gguf_files_are_the_tuned_model_in_llama_cpp(run_folder):
    """One merge for all; `--verify` fails by itself above the tolerances, those of the issue are held here."""
    options = ["--to-gguf", "f16", "--to-gguf", "q8_0", "--to-gguf", "q4_k_m", "--to-gguf-adapter", "--verify"]
    command = [sys.executable, "-m", "mlx_fish", "fuse", *options, "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=run_folder, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stderr.splitlines():
        if match := re.search(
            r"/([\w-]+)\.gguf read by llama\.cpp: max difference (\S+), KL (\S+) .* top-1 (\d+)%", line
        ):
            found[match[1]] = [float(match[number]) for number in (2, 3, 4)]
    assert set(found) == {"model-f16", "model-q8_0", "model-q4_k_m", "adapter"}, done.stderr
    assert found["model-f16"][2] == 100  # the same greedy answers
    assert found["model-q8_0"][1] < 5e-3
    assert found["adapter"][0] < 1e-3 and found["adapter"][2] == 100


def test_the_fused_model_answers_in_transformers_as_the_adapter_does(run_folder):
    """The same greedy text: the adapter in our backend, the fused folder in transformers, template and end tokens its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    question = "新手适合养什么淡水观赏鱼？"
    done = subprocess.run(
        [sys.executable, "-m", "mlx_fish", "generate", "--max-tokens", "24", "-p", question],
        capture_output=True,
        text=True,
        cwd=run_folder,
        check=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "fused_model")
    model = AutoModelForCausalLM.from_pretrained(run_folder / "fused_model", dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(
        **prompt, max_new_tokens=24, do_sample=False, repetition_penalty=1.0
    )  # the config has one of 1.1
    theirs = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(theirs) > 10
    assert done.stdout.strip() == theirs.strip()
