"""The shape of an adapter: kinds and their scales, the flat vector, and what each kind writes for others to read."""

import json
import math

import numpy as np
import pytest

from mlx_fish.adapters.peft import load_adapter, peft_config, save_adapter
from mlx_fish.adapters.spec import AdapterSpec, FlatLayout, choose_layers, initial_arrays
from mlx_fish.backends.choose import load_backend

SHAPES = {"model.layers.0.mlp.up_proj": (7, 4), "model.layers.1.self_attn.q_proj": (4, 4)}


def test_the_scale_of_each_kind():
    for kind, scale in (("lora", 12 / 9), ("rslora", 12 / 3)):
        spec = AdapterSpec.uniform(SHAPES, kind=kind, rank=9, alpha=12)
        assert [layer.scale for layer in spec.layers.values()] == [pytest.approx(scale)] * 2
        assert spec.num_parameters == 9 * (7 + 4) + 9 * (4 + 4)


def test_the_flat_vector_is_the_tensors_in_order():
    spec = AdapterSpec.uniform(SHAPES, rank=2, alpha=4)
    layout = FlatLayout(spec)
    arrays = {key: np.full(shape, number, np.float32) for number, (key, shape) in enumerate(spec.shapes.items())}
    flat = layout.flatten(arrays)
    assert flat.tolist() == [0.0] * 8 + [1.0] * 14 + [2.0] * 8 + [3.0] * 8
    back = layout.unflatten(flat)
    assert list(back) == list(arrays) and all((back[key] == arrays[key]).all() for key in arrays)
    assert layout.by_layer("abcd") == [["a", "b"], ["c", "d"]]
    assert np.cumsum(layout.sizes)[:-1].tolist() == layout.ends


@pytest.mark.parametrize("rank", [4, 8])
def test_rslora_trains_and_is_read_by_peft_with_its_own_scale(tiny, tmp_path, backend_name, rank):
    """The adapter that is written, and PEFT's own rsLoRA layers with the same tensors, compute the same logits."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    layers = choose_layers(tiny.linear_layers, target="q_proj,down_proj")
    spec = AdapterSpec.uniform(layers, kind="rslora", rank=rank, alpha=3)
    generator = np.random.default_rng(0)
    arrays = {key: generator.normal(0, 0.1, shape).astype(np.float32) for key, shape in spec.shapes.items()}
    backend = load_backend(tiny, name=backend_name)
    backend.attach(spec, arrays)
    ids = np.arange(5, 25, dtype=np.int32)
    found = backend.logits(ids)
    config = peft_config(spec, rank=rank, alpha=3, num_blocks=4, base=str(tiny.path), revision=None)
    assert config["use_rslora"] is False and config["lora_alpha"] / rank == pytest.approx(3 / math.sqrt(rank))
    save_adapter(tmp_path, arrays, config)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == rank

    def logits(model):
        with torch.no_grad():
            return model(torch.from_numpy(ids[None]).long()).logits[0].numpy()

    def base():
        return AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)

    scale = np.abs(found).max()
    assert np.abs(logits(PeftModel.from_pretrained(base(), tmp_path).eval()) - found).max() < 1e-5 * scale
    named = LoraConfig(
        r=rank, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(base(), named).eval()
    state = {key.replace(".weight", ".default.weight"): torch.from_numpy(array) for key, array in arrays.items()}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    assert np.abs(logits(theirs) - found).max() < 1e-5 * scale
    ours = load_adapter(tmp_path)
    assert [layer.scale for layer in ours.spec.layers.values()] == [pytest.approx(3 / math.sqrt(rank))] * len(layers)


def test_a_start_depends_on_its_own_layer_alone():
    one = initial_arrays(AdapterSpec.uniform(SHAPES, rank=2, alpha=4), 7)
    only = {"model.layers.1.self_attn.q_proj": (4, 4)}
    assert all(
        (one[key] == array).all()
        for key, array in initial_arrays(AdapterSpec.uniform(only, rank=2, alpha=4), 7).items()
    )
    other = initial_arrays(AdapterSpec.uniform(only, rank=2, alpha=4), 8)
    assert any((one[key] != array).any() for key, array in other.items())
