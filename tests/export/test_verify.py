"""Every artifact, read by another program, is the adapter model; a planted fault is not. Tiny random models of both kinds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuse_models import add_run_files, make_adapter, make_model

from mlx_fish.adapters.peft import Adapter, load_adapter
from mlx_fish.adapters.spec import initial_arrays, tensor_key
from mlx_fish.errors import FishError
from mlx_fish.export import gguf, gguf_adapter
from mlx_fish.export.fuse import fuse
from mlx_fish.export.gguf import GgufWriter
from mlx_fish.export.targets import Artifact, Target
from mlx_fish.export.verify import compare as verify
from mlx_fish.export.verify.compare import Check, Comparison, ask_reader, mean_kl, verify_artifacts
from mlx_fish.export.verify.readers import READERS
from mlx_fish.export.writer import MergedModel

pytestmark = pytest.mark.process

EXACT = 1e-4  # of any log-probability


def ask_here(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same readers without a process each, but for llama.cpp: importing transformers takes seconds."""
    if request["reader"] == "llama.cpp":
        return ask_reader(request, folder)
    return {key: np.asarray(value) for key, value in READERS[request["reader"]](request).items()}


class Pair:
    """A base and an adapter on it, the adapter model's answers, and what the readers made of every target."""

    def __init__(self, folder: Path, kind: str):
        self.kind, self.folder = kind, folder
        self.base = make_model(folder / "base", kind, tied=kind == "qwen2")
        self.adapter = make_adapter(folder / "adapter", self.base)
        add_run_files(self.adapter, self.base)
        (folder / "check").mkdir()
        self.check = Check(self.base, self.adapter, folder / "check", ask_here)
        self.targets = [
            Target("hf", folder / "hf", dtype="float32"),
            Target("gguf", folder / "gguf", file_types=("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m")),
            Target("gguf-adapter", folder / "gguf-adapter"),
            Target("ollama", folder / "ollama", file_types=("f32",), as_adapter=True),
            Target("mlx", folder / "mlx", dtype="float32", bits=8, group_size=32),
            Target("mlx-adapter", folder / "mlx-adapter"),
        ]
        result = fuse(base=self.base, adapter=self.adapter, targets=self.targets)
        self.found = {(a.kind, a.dtype): self.read(a) for a in result.artifacts}

    def read(self, artifact: Artifact) -> Comparison:
        reader = {"hf": "transformers", "mlx": "mlx-lm", "mlx-adapter": "mlx-lm"}.get(artifact.kind, "llama.cpp")
        return self.check.compare(artifact, reader)

    def again(self, target: Target) -> Comparison:
        """Written once more, with whatever fault was planted since, and read."""
        return self.read(fuse(base=self.base, adapter=self.adapter, targets=[target], overwrite=True).artifacts[0])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: Any) -> dict[str, Pair]:
    return {kind: Pair(tmp_path_factory.mktemp(kind), kind) for kind in ("qwen2", "llama")}


@pytest.fixture(params=["qwen2", "llama"])
def pair_read(request: Any, pairs: dict[str, Pair]) -> Pair:
    return pairs[request.param]


@pytest.fixture
def qwen_read(pairs: dict[str, Pair]) -> Pair:
    return pairs["qwen2"]


def test_every_target_is_the_adapter_model(pair_read: Pair) -> None:
    found = pair_read.found
    assert len(found) == 11
    for key in (
        ("hf", "float32"), ("gguf", "f32"), ("gguf-adapter", "float32"), ("ollama", "f32"), ("mlx-adapter", "float32"),
    ):  # fmt: skip
        assert found[key].difference < EXACT, found[key]
        assert found[key].agreement == 1.0, found[key]
    assert found["gguf", "f16"].agreement == 1.0 and found["gguf", "f16"].divergence < 1e-5  # the same greedy answers
    assert found["gguf", "q8_0"].divergence < 5e-3
    for comparison in found.values():
        assert comparison.faults == [], str(comparison)
        assert comparison.base_divergence > 0.1  # the adapter does something at all
        assert comparison.wrong == ()


def test_better_types_are_nearer(pair_read: Pair) -> None:
    nearness = [pair_read.found["gguf", name].divergence for name in ("f32", "f16", "bf16", "q8_0", "q4_k_m", "q4_0")]
    assert nearness == sorted(nearness)


# Negative controls: each fault, planted in the writers, must be found


def swap_rotary_order(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = {} if pair.kind == "llama" else {"q_proj": 4, "k_proj": 2}
    monkeypatch.setattr(gguf, "rotary_heads", lambda config: heads)


def change_config(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    write = gguf.add_config_keys
    monkeypatch.setattr(gguf, "add_config_keys", lambda writer, config: write(writer, {**config, "rope_theta": 1e6}))


def drop_biases(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    put = GgufWriter.put
    zeroed = ".bias" if pair.kind == "qwen2" else "norm.weight"  # llama has no biases: its norms stand for them
    monkeypatch.setattr(
        GgufWriter, "put", lambda self, name, array: put(self, name, array * (not name.endswith(zeroed)))
    )


def cut_the_template(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MergedModel, "own_template", lambda self: str(self.chat_template).replace(" + '<end>'", ""))


@pytest.mark.parametrize("plant", [swap_rotary_order, change_config, drop_biases, cut_the_template])
def test_a_fault_in_the_model_is_found(
    pair_read: Pair, plant: Callable[[Pair, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(pair_read, monkeypatch)
    assert pair_read.again(Target("gguf", tmp_path / "gguf", file_types=("f32",))).faults


def not_transposed(adapter: Adapter) -> Adapter:
    arrays = dict(adapter.arrays)
    for module in adapter.spec.layers:
        a = arrays[tensor_key(module, "lora_A")]
        arrays[tensor_key(module, "lora_A")] = np.ascontiguousarray(a.T).reshape(a.shape)
    return replace(adapter, arrays=arrays)


def not_scaled(adapter: Adapter) -> Adapter:
    layers = {module: replace(layer, scale=1.0) for module, layer in adapter.spec.layers.items()}
    return replace(adapter, spec=replace(adapter.spec, layers=layers))


@pytest.mark.parametrize("spoil", [not_transposed, not_scaled])
@pytest.mark.parametrize("kind", ["gguf-adapter", "mlx-adapter"])
def test_a_fault_in_an_adapter_file_is_found(
    pair_read: Pair, spoil: Callable[[Adapter], Adapter], kind: str, tmp_path: Path
) -> None:
    spoilt = fuse(base=pair_read.base, adapter=spoil(pair_read.adapter), targets=[Target(kind, tmp_path / "out")])
    assert pair_read.read(spoilt.artifacts[0]).faults


def test_the_rotary_order_of_an_adapter_file_matters(
    pair_read: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    heads = {} if pair_read.kind == "llama" else {"q_proj": 4, "k_proj": 2}
    monkeypatch.setattr(gguf_adapter, "rotary_heads", lambda config: heads)
    assert pair_read.again(Target("gguf-adapter", tmp_path / "out")).faults


def test_a_fault_fails_loudly(qwen_read: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    change_config(qwen_read, monkeypatch)
    result = fuse(
        base=qwen_read.base, adapter=qwen_read.adapter, targets=[Target("gguf", tmp_path / "g", file_types=("f32",))]
    )
    with pytest.raises(FishError, match="differ from the adapter model, do not use them"):
        verify_artifacts(qwen_read.base, qwen_read.adapter, result.artifacts, required=True)


def test_a_file_that_cannot_be_read_is_told(qwen_read: Pair, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(FishError, match=r"llama\.cpp cannot read"):
        qwen_read.read(Artifact("gguf", tmp_path / "broken.gguf", "f32", 0))


# What the check itself demands


def test_an_adapter_that_changes_nothing(qwen_read: Pair, tmp_path: Path) -> None:
    from mlx_fish.adapters.peft import save_adapter

    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder, initial_arrays(qwen_read.adapter.spec, 1), qwen_read.adapter.config)
    with pytest.raises(FishError, match="changes no answer"):
        Check(qwen_read.base, load_adapter(folder), tmp_path, ask_here)


def test_a_missing_reader_is_told_or_refused(qwen_read: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify._NEEDS, "llama.cpp", "no_such_package")
    artifacts = [qwen_read.found["gguf", "f32"].artifact]
    said: list[str] = []
    assert verify_artifacts(qwen_read.base, qwen_read.adapter, artifacts, required=False, say=said.append) == []
    assert "not read back" in said[0]
    with pytest.raises(FishError, match=r"mlx-fish\[verify\]"):
        verify_artifacts(qwen_read.base, qwen_read.adapter, artifacts, required=True)


def test_nothing_to_compute_the_adapter_model_with(qwen_read: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("peft", "mlx-lm"):
        monkeypatch.setitem(verify._NEEDS, name, "no_such_package")
    artifacts = [qwen_read.found["gguf", "f32"].artifact]
    said: list[str] = []
    assert verify_artifacts(qwen_read.base, qwen_read.adapter, artifacts, required=False, say=said.append) == []
    assert "nothing was read back" in said[0]
    with pytest.raises(FishError, match="neither PEFT nor MLX"):
        verify_artifacts(qwen_read.base, qwen_read.adapter, artifacts, required=True)


def test_without_torch_mlx_reads_and_the_trained_model_is_the_reference(
    qwen_read: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("peft", "transformers"):
        monkeypatch.setitem(verify._NEEDS, name, "no_such_package")
    check = Check(qwen_read.base, qwen_read.adapter, tmp_path, ask_here)
    assert check.rows == qwen_read.check.rows
    assert np.abs(check.expected - qwen_read.check.expected).max() < EXACT
    artifact = qwen_read.found["hf", "float32"].artifact
    reader = verify._reader_of(artifact)
    assert reader == "mlx-lm" and check.compare(artifact, reader).difference < EXACT


def test_an_mlx_lm_adapter_is_its_own_reference(qwen_read: Pair, tmp_path: Path) -> None:
    """Out to mlx-lm's layout and in again: mlx-lm's own adapter model is what everything is compared with."""
    again = load_adapter(qwen_read.found["mlx-adapter", "float32"].artifact.path)
    check = Check(qwen_read.base, again, tmp_path, ask_here)
    result = fuse(base=qwen_read.base, adapter=again, targets=[Target("hf", tmp_path / "hf", dtype="float32")])
    assert check.compare(result.artifacts[0], "transformers").difference < EXACT


def test_mean_kl() -> None:
    p = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]], np.float32))
    q = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]], np.float32))
    assert mean_kl(p, q) == pytest.approx(0.25 * np.log(2) / 2, abs=1e-6)
    assert mean_kl(p, p) == 0
