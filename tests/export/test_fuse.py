"""Fused = adapter: against PEFT, transformers and mlx-lm, on tiny random models made here."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fuse_models import (
    ALPHA,
    IDS,
    RANK,
    TEMPLATE,
    VOCABULARY,
    add_run_files,
    hf_logits,
    make_adapter,
    make_model,
    peft_logits,
    run_fuse,
    torch,
    transformers,
)
from paths import ROOT

from mlx_fish.adapters.merge import delta
from mlx_fish.adapters.peft import Adapter
from mlx_fish.adapters.spec import initial_arrays, tensor_key
from mlx_fish.errors import FishError
from mlx_fish.models.folder import RECORD, ModelFolder
from mlx_fish.storage.files import read_json, write_json
from mlx_fish.storage.tensors import open_weights


def test_fused_is_the_adapter(pair: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = pair
    result = run_fuse(base, adapter, tmp_path / "fused", dtype="float32")
    beside, merged = peft_logits(base.path, adapter.path)
    fused = hf_logits(tmp_path / "fused")
    assert np.abs(fused - merged).max() < 1e-5
    assert np.abs(fused - beside).max() < 1e-4
    assert np.abs(fused - hf_logits(base.path)).max() > 0.1  # the adapter does something at all
    assert (result.layers, result.kept, result.expanded, result.original) == (21, 1.0, False, None)
    assert result.changed > 0.99


def test_mlx_lm_computes_the_same(pair: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    import mlx.core as mx
    import mlx_lm

    base, adapter = pair
    run_fuse(base, adapter, tmp_path / "fused", dtype="float32")
    model, _ = mlx_lm.load(str(tmp_path / "fused"))
    logits = np.array(model(mx.array(IDS))[0].astype(mx.float32))
    assert np.abs(logits - hf_logits(tmp_path / "fused")).max() < 1e-4


def test_folder_is_complete(pair: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = pair
    add_run_files(adapter, base)
    tokenizer_config = {**read_json(adapter.path / "tokenizer_config.json"), "model_max_length": 4321}
    write_json(adapter.path / "tokenizer_config.json", tokenizer_config)
    out = tmp_path / "fused"
    result = run_fuse(base, adapter, out, dtype="bfloat16")
    config = read_json(out / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 12345.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert (
        config["architectures"] == {"qwen2": ["Qwen2ForCausalLM"], "llama": ["LlamaForCausalLM"]}[config["model_type"]]
    )
    assert not {"quantization", "auto_map"} & set(config)
    assert read_json(out / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": [3, 2]}
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    assert read_json(out / "tokenizer_config.json")["chat_template"] == TEMPLATE
    weights = open_weights(out)
    assert ("lm_head.weight" in weights) == (not config["tie_word_embeddings"])
    assert {info.dtype for info in weights.values()} == {"BF16"}
    assert list(weights) == list(base.weights)  # file order
    assert result.num_bytes == 2 * weights.num_parameters
    record = read_json(out / RECORD)
    assert (record["made_by"], record["base"], record["adapter"]) == ("mlx-fish fuse", "Owner/Base", "adapter")
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), f"{file.name} tells where it was made"
    assert "3.5000 before, 1.2500 after" in (out / "README.md").read_text(encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.model_max_length == 4321  # the adapter folder's own files
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False) == "w5<end>"
    fused = ModelFolder(out, "fused")
    assert fused.fingerprint != base.fingerprint  # another model, and known as such


def test_a_peft_folder_without_run_files(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    run_fuse(base, adapter, tmp_path / "fused")
    assert read_json(tmp_path / "fused" / "generation_config.json")["eos_token_id"] == [2]
    assert (tmp_path / "fused" / "tokenizer.json").read_bytes() == (base.path / "tokenizer.json").read_bytes()


def test_end_token_of_the_template_is_never_lost(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    add_run_files(adapter, base)
    (adapter.path / "generation_config.json").unlink()
    run_fuse(base, adapter, tmp_path / "fused")
    assert read_json(tmp_path / "fused" / "generation_config.json")["eos_token_id"] == [3, 2]


def test_a_second_copy_of_a_tied_head_is_left_out(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    base, adapter = qwen
    tensors = load_file(base.path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, base.path / "model.safetensors", {"format": "pt"})
    run_fuse(ModelFolder(base.path, "base"), adapter, tmp_path / "fused", dtype="float32")
    assert "lm_head.weight" not in open_weights(tmp_path / "fused")
    assert np.abs(hf_logits(tmp_path / "fused") - peft_logits(base.path, adapter.path)[1]).max() < 1e-5


def test_shards(pair: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = pair
    run_fuse(base, adapter, tmp_path / "whole", dtype="float32")
    run_fuse(base, adapter, tmp_path / "sharded", dtype="float32", shard_bytes=100_000)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    assert np.array_equal(hf_logits(tmp_path / "whole"), hf_logits(tmp_path / "sharded"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast_is_torchs(qwen: tuple[ModelFolder, Adapter], tmp_path: Path, dtype: str) -> None:
    from safetensors.torch import load_file

    base, adapter = qwen
    run_fuse(base, adapter, tmp_path / "full", dtype="float32")
    run_fuse(base, adapter, tmp_path / "half", dtype=dtype)
    full, half = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "half"))
    for name, tensor in full.items():
        assert torch.equal(tensor.to(getattr(torch, dtype)), half[name]), name


def test_default_dtype_is_the_bases(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "qwen2", tied=True, dtype="float16")
    result = run_fuse(base, make_adapter(tmp_path / "adapter", base), tmp_path / "fused")
    assert result.dtype == read_json(tmp_path / "fused" / "config.json")["dtype"] == "float16"


def test_same_bytes_twice(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    add_run_files(adapter, base)
    run_fuse(base, adapter, tmp_path / "one")
    run_fuse(base, adapter, tmp_path / "two")
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_delta_does_not_depend_on_the_cpus_matrix_product(qwen: tuple[ModelFolder, Adapter]) -> None:
    _, adapter = qwen
    for module, layer in adapter.spec.layers.items():
        a, b = adapter.factors(module)
        total = np.zeros(layer.shape, np.float32)
        for k in range(RANK):  # each product and each sum rounded to float32, in this order
            total = total + b[:, k, None] * a[None, k]
        assert np.array_equal(delta(adapter, module), total * np.float32(ALPHA / RANK))


def test_progress_counts_every_byte(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    seen: list[tuple[int, int]] = []
    result = run_fuse(base, adapter, tmp_path / "fused", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (result.num_bytes, result.num_bytes)
    assert len(seen) == len(base.weights) and seen == sorted(seen)


# What is refused, and what a broken fuse leaves


def refused(match: str, base: ModelFolder, adapter: Adapter, out: Path, **options: Any) -> None:
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(FishError, match=match):
        run_fuse(base, adapter, out, **options)
    assert sorted(path.name for path in out.parent.iterdir()) == before


def test_wrong_base_of_the_same_shape(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    add_run_files(adapter, base)
    other = replace(make_model(tmp_path / "other", "qwen2", tied=True, seed=1), name="Owner/Other")
    refused("trained on Owner/Base, but the weights of Owner/Other", other, adapter, tmp_path / "fused")


def test_wrong_base_of_another_shape(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, _ = qwen
    adapter = make_adapter(tmp_path / "a", base, target="q_proj")
    layers = {module: replace(layer, shape=(64, 128)) for module, layer in adapter.spec.layers.items()}
    wider = replace(adapter, spec=replace(adapter.spec, layers=layers))
    refused(f"trained on {base.path}.* does not fit the model Owner/Base", base, wider, tmp_path / "fused")


def test_an_adapter_that_changes_nothing(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    refused("changes nothing", base, replace(adapter, arrays=initial_arrays(adapter.spec, 1)), tmp_path / "fused")


def test_an_adapter_that_is_not_finite(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    next(iter(adapter.arrays.values()))[0, 0] = np.nan
    refused("not finite", base, adapter, tmp_path / "fused")


def test_a_value_too_large_for_float16(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    adapter.arrays[tensor_key("model.layers.2.mlp.up_proj", "lora_B")] *= np.float32(1e7)
    refused(r"model\.layers\.2\.mlp\.up_proj\.weight has values beyond", base, adapter, tmp_path / "f", dtype="float16")


def test_unknown_dtype(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    refused("Did you mean `bfloat16`", *qwen, tmp_path / "fused", dtype="bfloat")


def test_full_disk(qwen: tuple[ModelFolder, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    refused("0.0 GB free", *qwen, tmp_path / "fused")


def test_target_is_protected(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear", encoding="utf-8")
    refused("was not made by mlx-fish", base, adapter, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").is_file()
    run_fuse(base, adapter, tmp_path / "fused")
    refused("--overwrite", base, adapter, tmp_path / "fused")
    run_fuse(base, adapter, tmp_path / "fused", overwrite=True)
    write_json(base.path / RECORD, {"made_by": "mlx-fish convert"})
    refused("would replace the base model", ModelFolder(base.path, "b"), adapter, base.path, overwrite=True)


def test_a_failed_fuse_keeps_what_was_there(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    run_fuse(base, adapter, tmp_path / "fused")
    old = (tmp_path / "fused" / "model.safetensors").read_bytes()

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        run_fuse(base, adapter, tmp_path / "fused", overwrite=True, dtype="float16", progress=stop)
    assert (tmp_path / "fused" / "model.safetensors").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_killed_fuse_leaves_no_folder(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    script = f"""
        import os, signal
        from pathlib import Path
        from mlx_fish.adapters.peft import load_adapter
        from mlx_fish.export.fuse import fuse
        from mlx_fish.models.folder import ModelFolder
        from mlx_fish.export.targets import Target

        def die(done, total):
            if done > total // 2:
                os.kill(os.getpid(), signal.SIGKILL)

        base = ModelFolder(Path({str(base.path)!r}), "Owner/Base")
        fuse(base=base, adapter=load_adapter(Path({str(adapter.path)!r})),
             targets=[Target("hf", Path({str(tmp_path / "fused")!r}))], progress=die)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "fused").exists()
    run_fuse(base, adapter, tmp_path / "fused")
    assert hf_logits(tmp_path / "fused").shape == (8, VOCABULARY)


def test_fusing_loads_no_framework(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    script = f"""
        import json, sys
        from pathlib import Path
        from mlx_fish.adapters.peft import load_adapter
        from mlx_fish.export.fuse import fuse
        from mlx_fish.models.folder import ModelFolder
        from mlx_fish.export.targets import Target

        base = ModelFolder(Path({str(base.path)!r}), "Owner/Base")
        fuse(base=base, adapter=load_adapter(Path({str(adapter.path)!r})),
             targets=[Target("hf", Path({str(tmp_path / "fused")!r}))])
        print(json.dumps([name for name in ("mlx", "torch", "transformers") if name in sys.modules]))
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    child = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert json.loads(child.stdout) == []
