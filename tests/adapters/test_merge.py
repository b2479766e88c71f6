"""What a cast leaves of an adapter, and the base's values when MLX quantised it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuse_models import make_adapter, make_model, make_tokenizer, run_fuse

from mlx_fish.adapters.merge import Survival, delta
from mlx_fish.adapters.peft import Adapter
from mlx_fish.errors import FishError
from mlx_fish.models.folder import RECORD, ModelFolder
from mlx_fish.storage.files import read_json, write_json
from mlx_fish.storage.tensors import decode, encode, open_weights

# How much survives


def survival(weight: Any, change: Any, dtype: str) -> Survival:
    found = Survival()
    stored = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    found.add(weight[:, None], change[:, None], lambda rows: decode(encode(rows, dtype), stored).reshape(rows.shape))
    return found


def test_a_change_below_half_a_step_is_lost() -> None:
    ones = np.ones(1000, np.float32)  # bfloat16 steps by 1/128 above 1
    assert survival(ones, ones / 1000, "bfloat16").kept == 0.0
    assert survival(ones, ones / 1000, "bfloat16").changed == 0.0


def test_a_change_of_whole_steps_is_kept() -> None:
    ones = np.ones(1000, np.float32)
    found = survival(ones, np.where(np.arange(1000) % 4, 0, ones / 64).astype(np.float32), "bfloat16")
    assert (found.kept, found.changed) == (1.0, 0.25)


def test_what_is_lost_is_measured_by_the_change() -> None:
    ones = np.ones(1000, np.float32)
    found = survival(ones, ones * np.float32(0.75 / 128), "bfloat16")  # stored as one step: off by a quarter of it
    assert found.kept == pytest.approx(1 - 0.25 / 0.75)


def test_what_the_cast_costs_the_base_is_not_the_adapters_loss() -> None:
    generator = np.random.default_rng(0)
    weight = generator.uniform(1, 2, 100_000).astype(np.float32)  # in no 16-bit type
    change = (generator.standard_normal(100_000) * 1e-3).astype(np.float32)
    assert survival(weight, change, "bfloat16").kept > 0.8
    on_grid = decode(encode(weight, "bfloat16"), "BF16")
    assert survival(on_grid, change, "bfloat16").kept < 0.1


def test_result_tells_a_swallowed_adapter(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "qwen2", tied=True, dtype="bfloat16")
    adapter = make_adapter(tmp_path / "adapter", base, size=2e-4)
    half = run_fuse(base, adapter, tmp_path / "half")
    full = run_fuse(base, adapter, tmp_path / "full", dtype="float32")
    assert half.dtype == "bfloat16" and half.kept < 0.5 and half.changed < 0.5
    assert full.kept == 1.0 and full.changed > 0.9


# A base that MLX quantised


def quantise(
    base: ModelFolder, out: Path, bits: int, record: dict[str, Any] | None = None, **options: Any
) -> ModelFolder:
    import mlx_lm
    from mlx_lm.utils import quantize_model, save_config, save_model

    model, _ = mlx_lm.load(str(base.path), model_config={"rope_theta": 12345.0})
    model, config = quantize_model(model, {**base.config}, 32, bits, **options)
    out.mkdir()
    save_model(out, model)
    save_config(config, out / "config.json")
    make_tokenizer(out)
    if record:
        write_json(out / RECORD, record)
    return ModelFolder(out, "Owner/Base")


def mixed(path: str, module: Any) -> bool | dict[str, int]:
    """As mlx-lm's mixed recipes: some layers with settings of their own, some not quantised."""
    if not hasattr(module, "to_quantized") or path.endswith("o_proj"):
        return False
    return {"group_size": 64, "bits": 8} if path.endswith("q_proj") else True


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_is_expanded(pair: tuple[ModelFolder, Adapter], tmp_path: Path, bits: int) -> None:
    import mlx.core as mx

    base, adapter = pair
    packed = quantise(base, tmp_path / "packed", bits)
    result = run_fuse(packed, adapter, tmp_path / "fused", dtype="float32")
    assert result.expanded and result.original is None
    stored = mx.load(str(tmp_path / "packed" / "model.safetensors"))
    fused = open_weights(tmp_path / "fused")
    assert set(fused) == set(base.weights)
    for name in base.weights:
        expected = stored[name]
        module = name.removesuffix(".weight")
        if f"{module}.scales" in stored:
            scales, biases = stored[f"{module}.scales"], stored[f"{module}.biases"]
            expected = mx.dequantize(expected, scales, biases, group_size=32, bits=bits)
        change = delta(adapter, module) if module in adapter.spec.layers else 0
        assert np.array_equal(fused.read(name), np.array(expected) + change), name
    config = read_json(tmp_path / "fused" / "config.json")
    assert "quantization" not in config and "quantization_config" not in config


def test_expanded_base_defaults_to_bfloat16(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    assert run_fuse(quantise(base, tmp_path / "packed", 4), adapter, tmp_path / "fused").dtype == "bfloat16"


def test_original_is_used_while_it_is_there(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    record = {"source": str(base.path), "fingerprint": base.fingerprint}
    packed = quantise(base, tmp_path / "packed", 4, record)
    result = run_fuse(packed, adapter, tmp_path / "fused")
    assert (result.original, result.expanded, result.dtype) == (base.path, False, "float32")
    run_fuse(base, adapter, tmp_path / "straight")
    fused, straight = (tmp_path / name / "model.safetensors" for name in ("fused", "straight"))
    assert fused.read_bytes() == straight.read_bytes()


def test_original_of_the_hub_is_taken_from_its_cache(
    qwen: tuple[ModelFolder, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    base, adapter = qwen
    commit = "0" * 40
    snapshot = tmp_path / "cache" / "models--Owner--Base" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    base.path.rename(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    original = ModelFolder(snapshot, "Owner/Base", commit)
    record = {"source": "Owner/Base", "revision": commit, "fingerprint": original.fingerprint}
    packed = replace(quantise(original, tmp_path / "packed", 4, record), revision=commit)
    assert run_fuse(packed, adapter, tmp_path / "fused").original == snapshot
    absent = replace(packed, revision="1" * 40)
    assert run_fuse(absent, adapter, tmp_path / "again").expanded


def test_another_model_in_the_originals_place_is_not_used(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    other = make_model(tmp_path / "other", "qwen2", tied=True, seed=1)
    packed = quantise(base, tmp_path / "packed", 4, {"source": str(other.path), "fingerprint": base.fingerprint})
    assert run_fuse(packed, adapter, tmp_path / "fused").expanded


def test_layers_quantised_differently_are_expanded(pair: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = pair
    packed = quantise(base, tmp_path / "packed", 4, quant_predicate=mixed)
    assert packed.linear_layers == base.linear_layers
    assert packed.num_parameters == base.num_parameters
    run_fuse(packed, adapter, tmp_path / "fused", dtype="float32")
    fused = open_weights(tmp_path / "fused")
    errors = {}
    for kind in ("q_proj", "k_proj", "o_proj"):  # 8 bits in groups of 64, 4 in groups of 32, not quantised
        module = f"model.layers.0.self_attn.{kind}"
        exact = base.weights.read(f"{module}.weight") + delta(adapter, module)
        errors[kind] = float(np.abs(fused.read(f"{module}.weight") - exact).max())
    assert errors["o_proj"] == 0 < errors["q_proj"] < 0.005 < errors["k_proj"] < 0.05


def test_a_mode_that_is_not_affine_is_refused(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    packed = quantise(base, tmp_path / "packed", 4)
    config = packed.config
    write_json(packed.path / "config.json", {**config, "quantization": {**config["quantization"], "mode": "mxfp4"}})
    with pytest.raises(FishError, match="mode mxfp4"):
        run_fuse(ModelFolder(packed.path, "packed"), adapter, tmp_path / "fused")


def test_a_base_in_another_number_format_is_refused(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    base, adapter = qwen
    tensors = load_file(base.path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, base.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FishError, match=r"model\.norm\.weight as I8"):
        run_fuse(ModelFolder(base.path, "base"), adapter, tmp_path / "fused")
