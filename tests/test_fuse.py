"""Fused = adapter: against PEFT, transformers and mlx-lm, on tiny random models made here."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_fish.adapter import (
    Adapter,
    LoraSpec,
    choose_layers,
    delta,
    initial_arrays,
    key_a,
    key_b,
    load_adapter,
    peft_config,
    save_adapter,
)
from mlx_fish.blas import load_openblas
from mlx_fish.errors import FishError
from mlx_fish.files import read_json, write_json
from mlx_fish.fuse import FuseResult, fuse
from mlx_fish.merge import Survival
from mlx_fish.model_folder import RECORD, ModelFolder
from mlx_fish.tensors import decode, encode, open_weights

load_openblas()
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY = 300
IDS = [[1, 5, 9, 33, 71, 2, 64, 8]]
TEMPLATE = "{%- for message in messages -%}{{- message['content'] + '<end>' -}}{%- endfor -%}"
RANK, ALPHA = 4, 12.0


def make_model(folder: Path, kind: str, *, tied: bool, dtype: str = "float32", seed: int = 0) -> ModelFolder:
    """A random model as transformers 5 writes it: `rope_parameters`, no `rope_theta`."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    }
    names = {"qwen2": ("Qwen2Config", "Qwen2ForCausalLM"), "llama": ("LlamaConfig", "LlamaForCausalLM")}[kind]
    config, model_class = (getattr(transformers, name) for name in names)
    model = model_class(config(**sizes)).to(getattr(torch, dtype))
    with torch.no_grad():  # the norms and biases start at 1 and 0, which would hide a wrong one
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    assert "rope_theta" not in read_json(folder / "config.json")
    make_tokenizer(folder)
    return ModelFolder(folder, "Owner/Base", "abc123")


def make_tokenizer(folder: Path) -> None:
    """A byte is a token, in the byte-level form that both architectures' tokenizers have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:4])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def make_adapter(folder: Path, base: ModelFolder, *, size: float = 0.1, target: str = "all") -> Adapter:
    layers = choose_layers(base.linear_layers, target=target)
    spec = LoraSpec.uniform(layers, rank=RANK, alpha=ALPHA)
    arrays = initial_arrays(spec, 7)
    generator = np.random.default_rng(3)
    for module in layers:
        b = generator.standard_normal(arrays[key_b(module)].shape)
        arrays[key_b(module)] = (size * b).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    config = peft_config(spec, rank=RANK, alpha=ALPHA, num_blocks=3, base=str(base.path), revision=None)
    save_adapter(folder, arrays, config)
    return load_adapter(folder)


def add_run_files(adapter: Adapter, base: ModelFolder) -> None:
    """What `mlx-fish train` leaves beside the adapter."""
    make_tokenizer(adapter.path)
    (adapter.path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    write_json(adapter.path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [3]})
    run = {
        "version": "0.1.0",
        "settings": {"lora_rank": RANK, "lora_alpha": ALPHA},
        "base": {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint},
        "template": {"name": "alpaca", "end_token_id": 3},
        "data": {"name": "fish_care", "rows": 280},
        "results": {"loss_before": 3.5, "loss_after": 1.25},
    }
    write_json(adapter.path / "run.json", run)


def hf_logits(folder: Path, **options: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits[0].numpy()


def peft_logits(base: Path, adapter: Path) -> tuple[Any, Any]:
    """(with the adapter beside the base, merged by PEFT), float32."""
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT goes on without them
        tuned = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        beside = tuned(torch.tensor(IDS)).logits[0].numpy()
        return beside, tuned.merge_and_unload()(torch.tensor(IDS)).logits[0].numpy()


def run_fuse(base: ModelFolder, adapter: Adapter, out: Path, **options: Any) -> FuseResult:
    return fuse(base=base, adapter=adapter, out=out, **options)


@pytest.fixture(params=["qwen2", "llama"])
def pair(request: Any, tmp_path: Path) -> tuple[ModelFolder, Adapter]:
    base = make_model(tmp_path / "base", request.param, tied=request.param == "qwen2")
    return base, make_adapter(tmp_path / "adapter", base)


@pytest.fixture
def qwen(tmp_path: Path) -> tuple[ModelFolder, Adapter]:
    base = make_model(tmp_path / "base", "qwen2", tied=True)
    return base, make_adapter(tmp_path / "adapter", base)


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
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False) == "w5<end>"
    fused = ModelFolder(out, "fused")
    assert fused.fingerprint != base.fingerprint  # another model, and known as such


def test_a_peft_folder_without_run_files(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    run_fuse(base, adapter, tmp_path / "fused")
    assert read_json(tmp_path / "fused" / "generation_config.json")["eos_token_id"] == [2]
    assert (tmp_path / "fused" / "tokenizer.json").read_bytes() == (base.path / "tokenizer.json").read_bytes()


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
    for module, (out, inner) in adapter.spec.layers.items():
        a, b = adapter.arrays[key_a(module)], adapter.arrays[key_b(module)]
        total = np.zeros((out, inner), np.float32)
        for k in range(RANK):  # each product and each sum rounded to float32, in this order
            total = total + b[:, k, None] * a[None, k]
        assert np.array_equal(delta(adapter, module), total * np.float32(ALPHA / RANK))


def test_progress_counts_every_byte(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, adapter = qwen
    seen: list[tuple[int, int]] = []
    result = run_fuse(base, adapter, tmp_path / "fused", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (result.num_bytes, result.num_bytes)
    assert len(seen) == len(base.weights) and seen == sorted(seen)


# How much survives


def survival(weight: Any, change: Any, dtype: str) -> Survival:
    found = Survival()
    stored = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    found.add(weight, change, lambda array: decode(encode(array, dtype), stored))
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


def quantise(base: ModelFolder, out: Path, bits: int, record: dict[str, Any] | None = None) -> ModelFolder:
    import mlx_lm
    from mlx_lm.utils import quantize_model, save_config, save_model

    model, _ = mlx_lm.load(str(base.path), model_config={"rope_theta": 12345.0})
    model, config = quantize_model(model, {**base.config}, 32, bits)
    out.mkdir()
    save_model(out, model)
    save_config(config, out / "config.json")
    make_tokenizer(out)
    if record:
        write_json(out / RECORD, record)
    return ModelFolder(out, "Owner/Base")


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
    refused("trained on Owner/Base, and the weights of Owner/Other", other, adapter, tmp_path / "fused")


def test_wrong_base_of_another_shape(qwen: tuple[ModelFolder, Adapter], tmp_path: Path) -> None:
    base, _ = qwen
    adapter = make_adapter(tmp_path / "a", base, target="q_proj")
    wider = replace(adapter, spec=replace(adapter.spec, layers={name: (64, 128) for name in adapter.spec.layers}))
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
    adapter.arrays[key_b("model.layers.2.mlp.up_proj")] *= np.float32(1e7)
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
        from mlx_fish.adapter import load_adapter
        from mlx_fish.fuse import fuse
        from mlx_fish.model_folder import ModelFolder

        def die(done, total):
            if done > total // 2:
                os.kill(os.getpid(), signal.SIGKILL)

        fuse(base=ModelFolder(Path({str(base.path)!r}), "Owner/Base"), adapter=load_adapter(Path({str(adapter.path)!r})),
             out=Path({str(tmp_path / "fused")!r}), progress=die)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
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
        from mlx_fish.adapter import load_adapter
        from mlx_fish.fuse import fuse
        from mlx_fish.model_folder import ModelFolder

        fuse(base=ModelFolder(Path({str(base.path)!r}), "Owner/Base"), adapter=load_adapter(Path({str(adapter.path)!r})),
             out=Path({str(tmp_path / "fused")!r}))
        print(json.dumps([name for name in ("mlx", "torch", "transformers") if name in sys.modules]))
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    child = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert json.loads(child.stdout) == []
