"""Adapters of other trainers: made by PEFT and mlx-lm themselves, fused by us, computed by them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuse_models import IDS, hf_logits, make_model, peft_logits, run_fuse, torch, transformers

from mlx_fish.adapters.formats import peft_scale
from mlx_fish.adapters.peft import load_adapter
from mlx_fish.errors import FishError
from mlx_fish.export.fuse import fuse
from mlx_fish.export.targets import Target
from mlx_fish.inference.session import load_session
from mlx_fish.models.folder import ModelFolder
from mlx_fish.storage.files import read_json, write_json


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return make_model(tmp_path_factory.mktemp("base") / "model", "qwen2", tied=True)


def train_by_peft(base: ModelFolder, folder: Path, *, dtype: Any = None, **options: Any) -> Path:
    """A PEFT adapter whose every trained tensor is random, saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **options}))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    if dtype is not None:
        tuned = tuned.to(dtype)
    tuned.save_pretrained(folder)
    return folder


KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 2, r"layers\.1\..*up_proj": 6},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 3, "up_proj": 24},
    },
    "dora": {"target_modules": ["q_proj", "o_proj", "gate_proj"], "use_dora": True},
    "layers": {"target_modules": ["v_proj"], "layers_to_transform": [0, 2]},
    "full names": {"target_modules": ["model.layers.1.self_attn.v_proj", "layers.2.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.[02]\..*\.(q|o)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "bfloat16": {"target_modules": ["q_proj", "v_proj"], "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_fused_is_what_peft_computes(kind: str, base: ModelFolder, tmp_path: Path) -> None:
    folder = train_by_peft(base, tmp_path / "adapter", **KINDS[kind])
    run_fuse(base, load_adapter(folder), tmp_path / "fused", dtype="float32")
    beside, _ = peft_logits(base.path, folder)
    fused = hf_logits(tmp_path / "fused")
    assert np.abs(fused - beside).max() < 1e-4
    assert np.abs(fused - hf_logits(base.path)).max() > 0.02


def test_differing_scales_survive_in_adapter_files(base: ModelFolder, tmp_path: Path) -> None:
    """One alpha is all that GGUF and mlx-lm know: what differs goes into B."""
    from gguf import GGUFReader
    from safetensors.numpy import load_file

    adapter = load_adapter(train_by_peft(base, tmp_path / "adapter", **KINDS["patterns"]))
    targets = [Target("gguf-adapter", tmp_path / "g"), Target("mlx-adapter", tmp_path / "m")]
    fuse(base=base, adapter=adapter, targets=targets)
    reader = GGUFReader(tmp_path / "g" / "adapter.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    ours = load_file(tmp_path / "m" / "adapters.safetensors")
    scale = read_json(tmp_path / "m" / "adapter_config.json")["lora_parameters"]["scale"]
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_up": "mlp.up_proj"}
    from mlx_fish.adapters.merge import delta

    for block in range(3):
        for name, module in names.items():
            expected = delta(adapter, f"model.layers.{block}.{module}")
            a, b = (tensors[f"blk.{block}.{name}.weight.lora_{part}"] for part in "ab")
            np.testing.assert_allclose(alpha / len(a) * (b @ a), expected, rtol=1e-4, atol=1e-6)
            a, b = (ours[f"model.layers.{block}.{module}.lora_{part}"] for part in "ab")
            np.testing.assert_allclose(scale * (a @ b).T, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lms_layout(kind: str, base: ModelFolder, tmp_path: Path) -> None:
    """Made and computed by mlx-lm's own layers."""
    import mlx.core as mx
    import mlx_lm
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(2)
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    model = mlx_lm.load(str(base.path), model_config={"rope_theta": 12345.0})[0]
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    tuned = {
        name: array for name, array in tree_flatten(model.parameters()) if name.endswith(("lora_a", "lora_b", ".m"))
    }
    for name, array in tuned.items():
        if name.endswith("lora_b"):
            tuned[name] = 0.1 * mx.random.normal(array.shape)
    model.load_weights(list(tuned.items()), strict=False)
    folder = tmp_path / "adapter"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), tuned)
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters, "model": "Owner/Base"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    adapter = load_adapter(folder)
    assert adapter.base == "Owner/Base" and len(adapter.spec.layers) == 4
    run_fuse(base, adapter, tmp_path / "fused", dtype="float32")
    expected = np.array(model(mx.array(IDS))[0])
    assert np.abs(hf_logits(tmp_path / "fused") - expected).max() < 1e-4
    assert np.abs(expected - hf_logits(base.path)).max() > 0.02


# What is refused, and why


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, "full layers were trained in addition to LoRA"),
        ({"bias": "all"}, "biases were trained in addition to LoRA"),
        ({"lora_bias": True}, "B has a bias"),
        ({"fan_in_fan_out": True}, "stored transposed"),
        ({"init_lora_weights": "pissa_niter_4"}, "also changed the base's weights"),
        ({"trainable_token_indices": [3]}, "token embeddings were trained"),
        ({"layer_replication": [[0, 2]]}, "repeats layers of the base"),
        ({"some_new_idea": True}, "does not know and might compute wrongly"),
        ({"peft_type": "IA3"}, "type IA3, but only LORA is supported"),
        ({"use_dora": True}, "magnitude vectors do not match"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    changes: dict[str, Any], reason: str, base: ModelFolder, tmp_path: Path
) -> None:
    folder = train_by_peft(base, tmp_path / "adapter", target_modules=["q_proj"])
    write_json(folder / "adapter_config.json", {**read_json(folder / "adapter_config.json"), **changes})
    with pytest.raises(FishError, match=reason):
        load_adapter(folder)


def test_an_adapter_on_the_embedding_is_refused(base: ModelFolder, tmp_path: Path) -> None:
    folder = train_by_peft(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(FishError, match="adapters on embeddings or the head"):
        load_adapter(folder)


def test_dora_is_fused_but_neither_answered_with_nor_stored_as_lora(base: ModelFolder, tmp_path: Path) -> None:
    folder = train_by_peft(base, tmp_path / "adapter", **KINDS["dora"])
    with pytest.raises(FishError, match="is DoRA, but answering supports only plain LoRA; fuse it"):
        load_session(model=str(base.path), adapter=folder, no_adapter=False)
    with pytest.raises(FishError, match="is DoRA, but a GGUF adapter supports only plain LoRA"):
        fuse(base=base, adapter=load_adapter(folder), targets=[Target("gguf-adapter", tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_scales() -> None:
    assert peft_scale({"lora_alpha": 16}, "m", 8) == 2.0
    assert peft_scale({"lora_alpha": 16, "use_rslora": True}, "m", 4) == 8.0
    assert peft_scale({"alpha_pattern": {"q_proj": 4}}, "model.layers.0.self_attn.q_proj", 8) == 0.5
    assert peft_scale({"alpha_pattern": {"q": 4}}, "model.layers.0.self_attn.q_proj", 8) == 1.0  # whole names only
