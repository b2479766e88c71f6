"""The memory model beside what MLX really holds, and beside itself: a part that should not move does not."""

import sys
from dataclasses import replace

import pytest
from paths import ROOT
from rotation import rotating

from mlx_fish.adapters.spec import AdapterSpec, block_of, choose_layers
from mlx_fish.planning.memory import Dimensions, Shape, forward_peak_of, peak_of, shape_of

sys.path.insert(0, str(ROOT / "tools"))
import fit_plan
import plan_settings

QUICK = [
    setting
    for setting in plan_settings.SETTINGS
    if setting.batch_size * setting.length <= 800 and setting.model in ("qwen2", "qwen2-4bit", "llama")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.slow
def test_the_peak_is_within_a_tenth_of_what_mlx_measures(models):
    """One of the models a day."""
    assert len(QUICK) >= 6
    assert {setting.model for setting in QUICK} == {"qwen2", "qwen2-4bit", "llama"}
    assert {setting.grad_checkpoint for setting in QUICK} == {setting.packing for setting in QUICK} == {True, False}
    model = rotating(sorted({setting.model for setting in QUICK}), 3)
    for measured in fit_plan.measure_in_children(models, [setting for setting in QUICK if setting.model in model]):
        expected = fit_plan.expected(measured, models)
        assert abs(expected / measured.peak - 1) < 0.1, (measured, expected)


@pytest.fixture(scope="module")
def model(tiny):
    return Dimensions.of(tiny, float_bytes=4)


@pytest.fixture(scope="module")
def spec(tiny):
    return AdapterSpec.uniform(choose_layers(tiny.linear_layers), rank=8, alpha=16)


SHAPE = Shape(tokens=1024, rows=4, width=256, labels=512)


def test_weights_are_counted_as_they_are_computed_with(tiny, model):
    stored = sum(info.end - info.start for info in tiny.weights.values())
    widened = 2 if tiny.weights.dtype in ("bfloat16", "float16") else 1
    assert model.weight_bytes == widened * stored
    assert Dimensions.of(tiny).weight_bytes == stored


def test_each_part_grows_with_its_own_cause(model, spec):
    base = peak_of(model, spec, SHAPE, grad_checkpoint=False)
    wider = peak_of(model, spec, replace(SHAPE, rows=8), grad_checkpoint=False)
    assert wider.attention == pytest.approx(2 * base.attention)
    assert base.activations < wider.activations < 1.5 * base.activations
    longer = peak_of(model, spec, replace(SHAPE, rows=2, width=512), grad_checkpoint=False)
    assert longer.attention == base.attention  # one block of queries at a time: never (rows, heads, width, width)
    more = peak_of(model, spec, replace(SHAPE, tokens=8192, rows=32), grad_checkpoint=False)
    assert more.activations == pytest.approx(8 * base.activations, rel=0.01)
    assert peak_of(model, spec, SHAPE, grad_checkpoint=True).total < base.total


def test_blocks_below_the_first_adapted_one_keep_nothing(tiny, model, spec):
    some = choose_layers(tiny.linear_layers, num_layers=1)
    less = peak_of(model, AdapterSpec.uniform(some, rank=8, alpha=16), SHAPE, grad_checkpoint=False)
    assert less.activations < 0.8 * peak_of(model, spec, SHAPE, grad_checkpoint=False).activations


def test_a_validation_holds_less_than_an_update(model, spec):
    assert forward_peak_of(model, spec, SHAPE).total < peak_of(model, spec, SHAPE, grad_checkpoint=False).total


def test_layers_are_adapted_in_the_models_order_whatever_the_files():
    shuffled = {f"model.layers.{block}.mlp.up_proj": (4, 4) for block in (9, 0, 10, 2, 1)}
    assert [block_of(module) for module in choose_layers(shuffled)] == [0, 1, 2, 9, 10]


def test_a_shape_is_that_of_its_batch():
    setting = plan_settings.Setting("qwen2", 3, 21)
    padded = shape_of(setting.micro_batch(100), packing=False)
    assert padded == Shape(tokens=3 * 24, rows=3, width=24, labels=48)
    batch = setting.batch(100)
    assert (batch.num_computed, *batch.inputs.shape, len(batch.targets)) == (72, 3, 24, 48)
    setting = replace(setting, packing=True, shortest=0.5)
    packed = shape_of(setting.micro_batch(100), packing=True)
    assert packed == Shape(tokens=48, rows=3, width=24, labels=32)
    batch = setting.batch(100)
    assert (batch.num_computed, *batch.packing.grid.shape, len(batch.targets)) == (48, 3, 24, 32)
