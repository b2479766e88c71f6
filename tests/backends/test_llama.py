"""Nothing is Qwen's alone: a random llama model, its head its own, trains as transformers, PEFT and torch's AdamW train it."""

import json
import shutil

import numpy as np
import pytest
import torch
from fuse_models import make_model

from mlx_fish.adapters.spec import AdapterSpec, choose_layers, initial_arrays
from mlx_fish.backends.choose import load_backend
from mlx_fish.backends.protocol import Sampling, optimizer_step
from mlx_fish.config import TrainConfig
from mlx_fish.data.batches import Batch
from mlx_fish.data.dataset import load_dataset
from mlx_fish.models.folder import ModelFolder
from mlx_fish.planning.job import describe, make_job

RANK, ALPHA = 4, 8.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama"), "llama", tied=False)


@pytest.fixture(scope="module")
def spec(llama):
    return AdapterSpec.uniform(choose_layers(llama.linear_layers), rank=RANK, alpha=ALPHA)


def start(spec):
    """An adapter whose B is not zero, so that A has a gradient from the first step."""
    arrays = initial_arrays(spec, 1)
    generator = np.random.default_rng(2)
    return {
        key: generator.normal(0, 0.1, array.shape).astype(np.float32) if ".lora_B." in key else array
        for key, array in arrays.items()
    }


def batch_of(ids, first_label):
    """Every row whole, the tokens from `first_label` on supervised."""
    rows, length = ids.shape
    positions = [row * (length - 1) + at - 1 for row in range(rows) for at in range(first_label, length)]
    targets = ids[:, first_label:].reshape(-1)
    return Batch(
        inputs=ids[:, :-1],
        positions=np.array(positions, np.int32),
        targets=targets,
        weights=np.ones(len(positions), np.float32),
        owners=np.array(positions, np.int32) // (length - 1),
        num_tokens=rows * (length - 1),
        num_supervised=len(positions),
        rows=("a:1", "a:2"),
    )


def test_three_updates_equal_torch_and_peft(llama, spec, backend_name):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    ids = np.random.default_rng(5).integers(0, 300, (2, 17)).astype(np.int32)
    arrays = start(spec)
    backend = load_backend(llama)
    backend.attach(spec, arrays)
    model = AutoModelForCausalLM.from_pretrained(llama.path, dtype=torch.float32)
    targets = sorted({module.rsplit(".", 1)[-1] for module in spec.layers})
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"))
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == set(arrays)
    for name, parameter in trained.items():
        parameter.data = torch.tensor(arrays[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(torch.tensor(ids[:, :-1]).long()).logits[:, 5:]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 300), torch.tensor(ids[:, 6:]).long().reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        result = optimizer_step(backend, [batch_of(ids, 6)], 1e-3, [0])()
        assert abs(result.loss - loss.item()) < 2e-5 * loss.item()
    for name, array in backend.adapter_arrays().items():
        np.testing.assert_allclose(array, trained[name].detach().numpy(), atol=2e-4)
    moved = max(np.abs(array - arrays[name]).max() for name, array in backend.adapter_arrays().items())
    assert moved > 1e-3


def test_greedy_tokens_equal_transformers(llama, backend_name):
    from transformers import AutoModelForCausalLM

    prompt = [5, 77, 130, 260, 12]
    ours = list(load_backend(llama).generate(prompt, Sampling(12), [2]))
    model = AutoModelForCausalLM.from_pretrained(llama.path, dtype=torch.float32)
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    assert ours == [token for token in theirs[0, len(prompt) :].tolist() if token != 2]


def test_rows_of_a_model_with_windows_are_padded(tiny, tmp_path, capsys):
    """The grid of packed rows knows no window: packing would let a query see too far."""
    assert make_job(TrainConfig(), tiny, load_dataset("fish_care")).updates.packing
    shutil.copytree(tiny.path, tmp_path / "windows")
    config = json.loads((tmp_path / "windows" / "config.json").read_text())
    kinds = ["full_attention", *["sliding_attention"] * (config["num_hidden_layers"] - 1)]
    (tmp_path / "windows" / "config.json").write_text(json.dumps(config | {"layer_types": kinds, "sliding_window": 8}))
    job = make_job(TrainConfig(), ModelFolder(tmp_path / "windows", "windows"), load_dataset("fish_care"))
    assert not job.updates.packing and job.updates[0][0].packing is None
    describe(job)
    assert "uses sliding-window attention" in capsys.readouterr().err
