"""Attention as a CPU, Metal and CUDA compute it, each way on this machine: values and gradients beside plain softmax attention."""

import mlx_fish.backends.mlx.runtime as runtime  # isort: skip
import mlx.core as mx
import numpy as np
import pytest

from mlx_fish.adapters.spec import AdapterSpec, choose_layers, initial_arrays
from mlx_fish.backends.choose import load_backend
from mlx_fish.backends.mlx.attention import PackedRows, causal_attention
from mlx_fish.backends.protocol import optimizer_step
from mlx_fish.data.batches import make_batch
from mlx_fish.data.dataset import load_dataset
from mlx_fish.data.templates.template import choose_template

pytestmark = pytest.mark.slow

LENGTHS = [300, 17, 128]  # more than one block of queries, and less


@pytest.fixture(params=["cpu", "metal", "cuda"])
def way(request, monkeypatch):
    monkeypatch.setattr(runtime, "on_gpu", request.param != "cpu")
    monkeypatch.setattr(runtime, "on_metal", request.param == "metal")
    return request.param


def plain(queries, keys, values):
    """(R, H, W, d), (R, K, W, d) twice -> (R W, H d): all scores at once."""
    rows, heads, width, size = queries.shape
    keys, values = (mx.repeat(x, heads // x.shape[1], axis=1) for x in (keys, values))
    scores = queries @ keys.swapaxes(-1, -2)
    hidden = mx.arange(width)[None] > mx.arange(width)[:, None]
    out = mx.softmax(mx.where(hidden, -mx.inf, scores), axis=-1) @ values
    return out.transpose(0, 2, 1, 3).reshape(rows * width, heads * size)


def layout(lengths, spare):
    """Rows end to end, and fillers behind them."""
    width = max(lengths)
    grid = np.full((len(lengths), width), -1, np.int32)
    inside = np.arange(width) < np.array(lengths)[:, None]
    grid[inside] = np.arange(sum(lengths))
    slots = np.full(sum(lengths) + spare, -1, np.int32)
    slots[: sum(lengths)] = np.flatnonzero(inside)
    return PackedRows(mx.array(grid), mx.array(slots)), mx.array(np.flatnonzero(inside))


@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_are_those_of_plain_attention(way, packed):
    rows, width = len(LENGTHS), max(LENGTHS)
    draw = np.random.default_rng(0).standard_normal
    queries, keys, values = (mx.array(draw((rows, heads, width, 16)), mx.float32) for heads in (4, 2, 2))
    where, inside = layout(LENGTHS, spare=5)
    kept = mx.arange(inside.size) if packed else inside  # only the rows' own tokens have a gradient
    cotangent = mx.array(draw((inside.size, 64)), mx.float32)

    def ours(*inputs):
        return (causal_attention(*inputs, where if packed else None)[kept] * cotangent).sum()

    def theirs(*inputs):
        return (plain(*inputs)[inside] * cotangent).sum()

    (found, gradients), (expected, more) = (
        mx.value_and_grad(compute, argnums=(0, 1, 2))(queries, keys, values) for compute in (ours, theirs)
    )
    assert abs(found.item() / expected.item() - 1) < 1e-5
    for ours_, theirs_ in zip(gradients, more, strict=True):
        np.testing.assert_allclose(np.array(ours_), np.array(theirs_), atol=2e-5)


def test_packed_rows_train_as_padded_ones_do(way, tiny, tokenizer):
    template = choose_template("auto", tokenizer, tiny)
    rows = [template.tokens(example, 2048) for example in load_dataset("fish_care").splits["train"][1:9:2]]
    spec = AdapterSpec.uniform(choose_layers(tiny.linear_layers), rank=4, alpha=8)
    found = []
    for packing in (True, False):
        backend = load_backend(tiny, name="mlx")
        backend.attach(spec, initial_arrays(spec, 1))
        found.append(optimizer_step(backend, [make_batch(rows, packing=packing)], 1e-3, [3])())
    assert abs(found[0].loss / found[1].loss - 1) < 1e-5
    assert abs(found[0].grad_norm / found[1].grad_norm - 1) < 1e-4


def test_metal_keeps_no_scores_of_all_pairs(monkeypatch):
    """MLX differentiates its fused attention into one that keeps (R, H, W, W) probabilities where no fused backward is there."""
    monkeypatch.setattr(runtime, "on_gpu", True)
    inputs = [mx.zeros((1, heads, 2048, 16)) for heads in (4, 2, 2)]
    peaks = {}
    for on_metal in (True, False):
        monkeypatch.setattr(runtime, "on_metal", on_metal)
        mx.eval(inputs)
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda *x: causal_attention(*x).sum(), argnums=(0, 1, 2))(*inputs))
        peaks[on_metal] = mx.get_peak_memory()
    assert peaks[True] < 0.5 * peaks[False]
