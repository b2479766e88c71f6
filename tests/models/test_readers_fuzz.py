"""Whatever bytes a stranger sends: each reader reads them or refuses them in words, in bounded memory and time."""

import contextlib
import json
import math
import resource
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_fish.adapters.peft import load_adapter
from mlx_fish.config import TrainConfig, read_yaml
from mlx_fish.errors import FishError
from mlx_fish.models.gguf.reader import GgufFile
from mlx_fish.storage.files import read_json
from mlx_fish.storage.tensors import read_header


def tensors_file(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


MALFORMED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a header longer than the file": tensors_file({}, size=1 << 40),
    "a header of 2^64 - 1": tensors_file({}, size=(1 << 64) - 1),
    "a header beyond the limit": tensors_file(b" " * (101 << 20)),
    "no JSON": tensors_file(b"{"),
    "an array": tensors_file(b"[]"),
    "not UTF-8": tensors_file(b'{"\xff": 1}'),
    "overlap": tensors_file({"a": entry(0, 4), "b": entry(2, 6)}, b"12345678"),
    "hole": tensors_file({"a": entry(0, 4), "b": entry(8, 12)}, b"123456789012"),
    "negative": tensors_file({"a": entry(-4, 4)}, b"1234"),
    "beyond the end": tensors_file({"a": entry(0, 4000, (1000,))}, b"1234"),
    "overflowing shape": tensors_file({"a": entry(0, 4, (1 << 62, 1 << 62, 4))}, b"1234"),
    "shape and size differ": tensors_file({"a": entry(0, 4, (2,))}, b"1234"),
    "end before start": tensors_file({"a": entry(4, 0)}, b"1234"),
    "unknown type": tensors_file({"a": entry(0, 4, dtype="Q99")}, b"1234"),
    "more data than told": tensors_file({"a": entry(0, 4)}, b"12345678"),
    "text for a shape": tensors_file({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}, b"1234"),
    "deep": tensors_file(b'{"a":' + b"[" * 100_000),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_safetensors(tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(MALFORMED[name])
    tracemalloc.start()
    with pytest.raises(FishError, match="is not a valid safetensors file"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


FUZZ = settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBER = st.integers(-4, 20) | st.sampled_from([1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)])


@FUZZ
@given(
    st.dictionaries(
        st.text(max_size=4),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "x", ""]),
                "shape": st.lists(NUMBER, max_size=4),
            },
            optional={"data_offsets": st.lists(NUMBER, min_size=1, max_size=3)},
        ),
        max_size=3,
    )
    | st.binary(max_size=40),
    st.binary(max_size=24),
    st.none() | NUMBER.filter(lambda number: 0 <= number < 1 << 64),
)
def test_any_safetensors_header(tmp_path, header, data, size):
    path = tmp_path / "a.safetensors"
    path.write_bytes(tensors_file(header, data, size))
    try:
        infos, _ = read_header(path)
    except FishError:
        return
    for info in infos:
        assert 0 <= info.start <= info.end <= path.stat().st_size


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A small valid file, to be damaged."""
    from gguf import GGUFWriter

    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    writer = GGUFWriter(path, "qwen2")
    writer.add_string("general.name", "fish")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@FUZZ
@given(st.data())
def test_any_damage_to_a_gguf_file(tmp_path, gguf, data):
    content = bytearray(gguf)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 9))
        value = data.draw(
            st.binary(min_size=1, max_size=1)
            | NUMBER.map(lambda number: struct.pack("<q", number % (1 << 64) - (1 << 63)))
        )
        content[at : at + len(value)] = value
    path = tmp_path / "a.gguf"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    tracemalloc.start()
    with contextlib.suppress(FishError):
        file = GgufFile(path)
        for name in file.tensors:
            file.read(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CONFIG_KEYS = [
    "peft_type", "r", "lora_alpha", "lora_dropout", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "bias", "modules_to_save",
    "fan_in_fan_out", "base_model_name_or_path", "target_modules", "layers_to_transform",
]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny):
    from mlx_fish.adapters.peft import save_adapter
    from mlx_fish.adapters.spec import AdapterSpec, choose_layers, initial_arrays

    folder = tmp_path_factory.mktemp("adapter")
    layers = choose_layers(tiny.linear_layers, target="q_proj", num_layers=1)
    save_adapter(
        folder,
        initial_arrays(AdapterSpec.uniform(layers, rank=1, alpha=2), 0),
        {"peft_type": "LORA", "r": 1, "lora_alpha": 2},
    )
    return folder


@FUZZ
@given(
    st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON, max_size=4).map(lambda config: {"peft_type": "LORA", **config})
    | JSON
)
def test_any_adapter_config(adapter, config):
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with contextlib.suppress(FishError):
        layers = load_adapter(adapter).spec.layers.values()
        assert all(math.isfinite(layer.scale) for layer in layers)


@FUZZ
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")))
def test_any_json_file(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with contextlib.suppress(FishError):
        assert isinstance(read_json(path), dict)


YAML = st.text(max_size=40) | st.dictionaries(
    st.sampled_from(["iters", "learning-rate", "seed", "model", "lora_alpha", "max_steps"]), JSON
).map(json.dumps)


@FUZZ
@given(YAML)
def test_any_yaml_file(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(FishError):
        assert TrainConfig(**read_yaml(path)).learning_rate >= 0


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch MARKER']",
        "!!python/name:os.system",
        "seed: !!python/object:os.system {}",
    ],
)
def test_yaml_makes_no_objects(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(FishError, match="not valid YAML"):
        read_yaml(tmp_path / "a.yaml")
    assert not (tmp_path / "MARKER").exists()


def test_yaml_references_do_not_explode(tmp_path):
    """A billion laughs: nine lines that name each other."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FishError, match="unknown setting `a0`"):
        read_yaml(tmp_path / "a.yaml")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
