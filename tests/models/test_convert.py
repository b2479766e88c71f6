"""Convert: the folder it writes is whole, exact, and loads in mlx-lm and transformers with the same logits."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import tiny_folders as tiny
from paths import ROOT

from mlx_fish.backends.choose import load_quantizer
from mlx_fish.errors import FishError
from mlx_fish.models.convert import convert, default_out
from mlx_fish.models.folder import ModelFolder
from mlx_fish.storage.tensors import open_weights

IDS = [[3, 77, 200, 256, 31, 5, 118, 258]]


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def logits_of_transformers(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def logits_of_mlx_lm(folder: Path) -> np.ndarray:
    import mlx.core as mx
    import mlx_lm

    model, _ = mlx_lm.load(str(folder))
    return np.array(model(mx.array(IDS)).astype(mx.float32))


@pytest.mark.parametrize(("model_type", "head"), [("qwen2", False), ("qwen2", True), ("llama", False), ("llama", True)])
def test_mlx_lm_and_transformers_compute_the_same(tmp_path: Path, model_type: str, head: bool) -> None:
    source = tiny.write_folder(
        tmp_path / "source", tiny.weights(model_type, head=head), model_type=model_type, tie_word_embeddings=not head
    )
    result = convert(model=str(source), out=tmp_path / "out")
    expected = logits_of_transformers(source)
    assert np.abs(expected).max() > 1  # the logits say something
    assert np.abs(logits_of_mlx_lm(result.path) - expected).max() < 1e-4
    assert np.array_equal(logits_of_transformers(result.path), expected)


def test_the_folder_is_complete(tmp_path: Path) -> None:
    source = tiny.write_folder(tmp_path / "source")
    seen: list[tuple[int, int]] = []
    result = convert(model=str(source), out=tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    config = read(result.path, "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 250000.0
    assert config["dtype"] == config["torch_dtype"] == "float32" and config["tie_word_embeddings"] is True
    assert read(result.path, "generation_config.json") == {"bos_token_id": 256, "eos_token_id": 258}
    assert read(result.path, "tokenizer_config.json")["chat_template"] == tiny.TEMPLATE
    assert (result.path / "chat_template.jinja").read_text() == tiny.TEMPLATE
    record = read(result.path, "mlx_fish.json")
    assert (
        record["made_by"] == "mlx-fish convert" and record["source"] == str(source) and record["quantization"] is None
    )
    assert record["fingerprint"] == ModelFolder(source, "x").fingerprint
    assert result.num_parameters == sum(array.size for array in tiny.weights().values())
    assert seen[-1] == (4 * result.num_parameters,) * 2
    assert result.num_bytes == (result.path / "model.safetensors").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_generation_config_is_copied(tmp_path: Path) -> None:
    source = tiny.write_folder(tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [258, 256], "top_k": 20}')
    convert(model=str(source), out=tmp_path / "out")
    assert read(tmp_path / "out", "generation_config.json") == {"eos_token_id": [258, 256], "top_k": 20}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_are_rounded_as_torch_rounds_them(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file

    source = tiny.write_folder(tmp_path / "source")
    result = convert(model=str(source), out=tmp_path / "out", dtype=dtype)
    written = load_file(result.path / "model.safetensors")
    assert result.dtype == dtype and read(result.path, "config.json")["torch_dtype"] == dtype
    for name, array in tiny.weights().items():
        assert torch.equal(written[name], torch.from_numpy(array).to(getattr(torch, dtype))), name
    back = convert(model=str(result.path), out=tmp_path / "back", dtype="float32")
    for name, array in load_file(back.path / "model.safetensors").items():
        assert torch.equal(array, written[name].float()), name


def test_the_sources_dtype_is_kept(tmp_path: Path) -> None:
    source = tiny.write_folder(tmp_path / "source", dtype="bfloat16")
    assert convert(model=str(source), out=tmp_path / "out").dtype == "bfloat16"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_several_dtypes_become_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny.write_folder(tmp_path / "source", dtype="bfloat16")
    mixed = load_file(source / "model.safetensors")
    mixed = {name: array.float() if "norm" in name else array for name, array in mixed.items()}
    save_file(mixed, source / "model.safetensors")
    convert(model=str(source), out=tmp_path / "out")
    weights = open_weights(tmp_path / "out")
    assert {info.dtype for info in weights.values()} == {"BF16"}


def test_a_sharded_source_and_a_copy_of_a_tied_head(tmp_path: Path) -> None:
    arrays = tiny.weights()
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    source = tiny.write_folder(tmp_path / "source", arrays, shard_bytes=60_000)
    assert len(list(source.glob("model-*.safetensors"))) > 2
    convert(model=str(source), out=tmp_path / "out")
    weights = open_weights(tmp_path / "out")
    assert set(weights) == set(tiny.weights())
    for name, array in tiny.weights().items():
        assert np.array_equal(weights.read(name), array)


def test_an_unsaid_tie_is_said(tmp_path: Path) -> None:
    """mlx-lm takes qwen2's head as tied when the config is silent, transformers as its own."""
    source = tiny.write_folder(tmp_path / "source", tiny.weights(head=True))
    config = read(source, "config.json")
    del config["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(config))
    result = convert(model=str(source), out=tmp_path / "out")
    assert read(result.path, "config.json")["tie_word_embeddings"] is False
    assert np.abs(logits_of_mlx_lm(result.path) - logits_of_transformers(source)).max() < 1e-4


@pytest.mark.parametrize(("bits", "error"), [(4, 0.15), (8, 0.01)])
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_quantised_folders_load_in_mlx_lm(tmp_path: Path, bits: int, error: float, kind: str) -> None:
    import mlx.core as mx

    arrays = tiny.weights()
    if kind == "folder":
        source = tiny.write_folder(tmp_path / "source", arrays)
    else:
        source = tiny.write_gguf(tmp_path / "source.gguf", arrays)
    seen: list[tuple[int, int]] = []
    result = convert(
        model=str(source),
        out=tmp_path / "out",
        quantizer=load_quantizer(bits, 32),
        progress=lambda done, total: seen.append((done, total)),
    )
    folder = ModelFolder(result.path, "x")
    assert folder.quantization and folder.quantization["bits"] == bits and folder.quantization["group_size"] == 32
    assert folder.num_parameters == result.num_parameters == sum(array.size for array in arrays.values())
    assert read(result.path, "mlx_fish.json")["quantization"] == {"bits": bits, "group_size": 32}
    assert seen[-1][0] == seen[-1][1]
    stored = mx.load(str(result.path / "model.safetensors"))
    expanded = dict(arrays)
    for name in (name for name, array in arrays.items() if array.ndim == 2):
        parts = (stored[f"{name.removesuffix('.weight')}.{part}"] for part in ("weight", "scales", "biases"))
        expanded[name] = np.array(mx.dequantize(*parts, group_size=32, bits=bits))
        assert np.sqrt(np.mean((expanded[name] - arrays[name]) ** 2) / np.mean(arrays[name] ** 2)) < error, name
    as_floats = tiny.write_folder(tmp_path / "floats", expanded)
    assert np.abs(logits_of_mlx_lm(result.path) - logits_of_transformers(as_floats)).max() < 1e-3
    assert not (result.path / "floats").exists()


def test_gguf_and_folder_give_the_same_model(tmp_path: Path) -> None:
    arrays = tiny.weights()
    source = tiny.write_folder(tmp_path / "source", arrays)
    path = tiny.write_gguf(tmp_path / "tiny.gguf", arrays)
    result = convert(model=str(path), out=tmp_path / "out")
    assert result.dtype == "float32"
    assert np.array_equal(logits_of_transformers(result.path), logits_of_transformers(source))
    assert np.abs(logits_of_mlx_lm(result.path) - logits_of_transformers(source)).max() < 1e-4
    assert read(result.path, "mlx_fish.json")["fingerprint"] == ModelFolder(source, "x").fingerprint
    assert read(result.path, "generation_config.json")["eos_token_id"] == [258, 256]


@pytest.mark.process
@pytest.mark.parametrize("quantizer", ["None", "load_quantizer(4, 32)"])
def test_a_killed_conversion_leaves_no_folder(tmp_path: Path, quantizer: str) -> None:
    source = tiny.write_folder(tmp_path / "source")
    program = (
        "import os\nfrom pathlib import Path\nfrom mlx_fish.backends.choose import load_quantizer\nfrom mlx_fish.models.convert import convert\n"
        f"convert(model={str(source)!r}, out=Path({str(tmp_path / 'out')!r}), quantizer={quantizer},"
        " progress=lambda done, total: os._exit(7) if done > total / 2 else None)\n"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 7, child.stderr
    assert not (tmp_path / "out").exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir() if path != source)
    convert(model=str(source), out=tmp_path / "out")  # what it left is in nobody's way


def test_a_failed_conversion_leaves_nothing_and_the_old_folder(tmp_path: Path) -> None:
    arrays = tiny.weights()
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * np.float32(1e6)
    source = tiny.write_folder(tmp_path / "source", arrays)
    convert(model=str(source), out=tmp_path / "out")
    with pytest.raises(FishError, match="65504"):
        convert(model=str(source), out=tmp_path / "out", dtype="float16", overwrite=True)
    assert read(tmp_path / "out", "mlx_fish.json")["dtype"] == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_existing_folder_is_found_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_fish.models.hub.fetch", lambda *a, **k: pytest.fail("fetched"))
    (tmp_path / "models" / "Qwen2-0.5B-mlx").mkdir(parents=True)
    (tmp_path / "models" / "Qwen2-0.5B-mlx" / "mine.txt").write_text("mine")
    with pytest.raises(FishError, match="--overwrite"):
        convert()
    with pytest.raises(FishError, match="not made by mlx-fish"):
        convert(overwrite=True)
    with pytest.raises(FishError, match="float64"):
        convert(dtype="float64", out=tmp_path / "out")
    with pytest.raises(FishError, match="-q 3"):
        convert(quantizer=load_quantizer(3, 64), out=tmp_path / "out")


def test_a_folder_is_not_written_over_itself(tmp_path: Path) -> None:
    source = tiny.write_folder(tmp_path / "source")
    convert(model=str(source), out=tmp_path / "out")
    with pytest.raises(FishError, match="itself"):
        convert(model=str(tmp_path / "out"), out=tmp_path / "out", overwrite=True)


def test_a_quantised_folder_is_refused_unless_its_original_is_known(tmp_path: Path) -> None:
    source = tiny.write_folder(tmp_path / "source")
    quantised = convert(model=str(source), out=tmp_path / "q", quantizer=load_quantizer(4, 32)).path
    again = convert(model=str(quantised), out=tmp_path / "again")
    assert again.source == str(source)
    assert np.array_equal(open_weights(again.path).read("model.norm.weight"), tiny.weights()["model.norm.weight"])
    (quantised / "mlx_fish.json").unlink()
    with pytest.raises(FishError, match="quantised by MLX to 4 bits"):
        convert(model=str(quantised), out=tmp_path / "third")


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq"])
def test_other_quantisations_are_named(tmp_path: Path, method: str) -> None:
    source = tiny.write_folder(tmp_path / "source", quantization_config={"quant_method": method})
    with pytest.raises(FishError, match=method):
        convert(model=str(source), out=tmp_path / "out")


def test_a_group_size_that_does_not_fit_names_the_layer(tmp_path: Path) -> None:
    source = tiny.write_folder(tmp_path / "source")
    with pytest.raises(FishError, match=r"mlp\.down_proj\.weight has 96 inputs.*--group-size 32"):
        convert(model=str(source), out=tmp_path / "out", quantizer=load_quantizer(4, 64))
    with pytest.raises(FishError, match="--group-size 48"):
        convert(model=str(source), out=tmp_path / "out", quantizer=load_quantizer(4, 48))


def test_without_mlx_quantising_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_fish.backends.mlx.quantize", None)
    source = tiny.write_folder(tmp_path / "source")
    with pytest.raises(FishError, match="pip install"):
        convert(model=str(source), out=tmp_path / "out", quantizer=load_quantizer(4, 32))
    convert(model=str(source), out=tmp_path / "out")


def test_plain_conversion_loads_no_framework(tmp_path: Path) -> None:
    source, path = tiny.write_folder(tmp_path / "source"), tiny.write_gguf(tmp_path / "a.gguf", tiny.weights())
    program = (
        "import sys\nfrom pathlib import Path\nfrom mlx_fish.models.convert import convert\n"
        f"convert(model={str(source)!r}, out=Path({str(tmp_path / 'one')!r}))\n"
        f"convert(model={str(path)!r}, out=Path({str(tmp_path / 'two')!r}))\n"
        "print(sorted({'mlx', 'torch', 'transformers', 'mlx_lm'} & set(sys.modules)))\n"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert child.stdout.strip() == "[]", child.stderr


def test_a_full_disk_is_seen_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.write_folder(tmp_path / "source")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1e12, 1e12, 5e7))
    with pytest.raises(FishError, match="0.1 GB are free|0.1 GB"):
        convert(model=str(source), out=tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    cases = {}
    pickled = tiny.write_folder(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cases[pickled] = "pickled"
    headless = tiny.write_folder(tmp_path / "headless", tie_word_embeddings=False)
    cases[headless] = r"no lm_head\.weight"
    wordless = tiny.write_folder(tmp_path / "wordless")
    (wordless / "tokenizer.json").unlink()
    cases[wordless] = r"no tokenizer\.json"
    coded = tiny.write_folder(tmp_path / "coded", model_file="model.py")
    cases[coded] = "model_file"
    empty = tmp_path / "empty"
    empty.mkdir()
    cases[empty] = r"no config\.json"
    for source, words in cases.items():
        with pytest.raises(FishError, match=words):
            convert(model=str(source), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_integer_tensors_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = tiny.write_folder(tmp_path / "source")
    arrays = load_file(source / "model.safetensors") | {"model.extra": np.ones(3, np.int32)}
    save_file(arrays, source / "model.safetensors")
    with pytest.raises(FishError, match=r"model\.extra as I32"):
        convert(model=str(source), out=tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 5000, "../../nowhere", "/nowhere/at/all", "missing.gguf", "a/b.gguf", ""]
)
def test_impossible_names_are_refused_in_words(tmp_path: Path, name: str) -> None:
    for out in (None, tmp_path / "out"):
        with pytest.raises(FishError) as caught:
            convert(model=name, out=out)
        assert len(str(caught.value)) < 400 and "\0" not in str(caught.value)


def test_default_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.q4.gguf").write_bytes(b"")
    assert default_out("Qwen/Qwen2-0.5B") == Path("models/Qwen2-0.5B-mlx")
    assert default_out("tiny") == Path("models/tiny-mlx")
    assert default_out("model.q4.gguf") == Path("models/model.q4-mlx")
    assert default_out(os.curdir) == Path(f"models/{tmp_path.name}-mlx")
