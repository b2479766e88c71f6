from itertools import product

import numpy as np
import pytest

from mlx_fish.data.batches import Capacity, make_batch
from mlx_fish.data.dataset import load_dataset
from mlx_fish.data.order import Updates, padding_share
from mlx_fish.data.templates.template import choose_template
from mlx_fish.data.tokens import Tokens


def row(number, length):
    ids = np.arange(length, dtype=np.int32) + 100 * number
    supervised = np.zeros(length, bool)
    supervised[length // 2 :] = True
    return Tokens(ids, supervised, f"a:{number}")


ROWS = [row(i, 6 + (i * 7) % 23) for i in range(37)]


def test_targets_are_the_next_supervised_ids():
    batch = make_batch(ROWS[:3])
    flat = batch.inputs.reshape(-1)
    labelled = batch.weights == 1
    assert (batch.targets[labelled] == flat[batch.positions[labelled]] + 1).all()
    expected = np.concatenate([r.ids[1:][r.supervised[1:]] for r in ROWS[:3]])
    assert (batch.targets[labelled] == expected).all()
    assert batch.num_supervised == len(expected) == int(batch.weights.sum())
    assert batch.num_tokens == sum(len(r.ids) - 1 for r in ROWS[:3])


def test_packed_rows_lie_end_to_end():
    batch = make_batch(ROWS[:3], packing=True, capacity=Capacity(tokens=64, width=24, labels=48))
    lengths = [len(r.ids) - 1 for r in ROWS[:3]]
    assert batch.inputs.shape == (1, 64) and batch.packing.grid.shape == (3, 24) and len(batch.targets) == 48
    for places, original, length in zip(batch.packing.grid, ROWS[:3], lengths, strict=True):
        assert (batch.inputs[0, places[:length]] == original.ids[:-1]).all() and (places[length:] == -1).all()
    slots = batch.packing.slots
    assert (batch.packing.grid.reshape(-1)[slots[: sum(lengths)]] == np.arange(sum(lengths))).all()
    assert (slots[sum(lengths) :] == -1).all()
    padded, labelled = make_batch(ROWS[:3]), batch.weights == 1
    assert (batch.targets[labelled] == padded.targets[padded.weights == 1]).all()
    assert (batch.targets[labelled] == batch.inputs[0, batch.positions[labelled]] + 1).all()


def test_few_shapes_and_little_padding_on_the_fish_data(tiny, tokenizer):
    template = choose_template("auto", tokenizer, tiny)
    rows = [template.tokens(example, 2048) for example in load_dataset("fish_care").splits["train"]]
    for batch_size in (4, 8, 16):
        updates = Updates(rows, batch_size=batch_size, accumulation=1, seed=42)
        batches = [batch for step in range(updates.per_epoch) for batch in updates[step]]
        assert padding_share(updates, updates.per_epoch) < 0.03
        assert len({(b.inputs.shape, b.packing.grid.shape, b.targets.shape) for b in batches}) <= 6


def test_every_row_once_an_epoch_whatever_the_split():
    for (batch_size, accumulation), packing in product(((4, 1), (1, 4), (5, 3), (64, 1)), (True, False)):
        updates = Updates(ROWS, batch_size=batch_size, accumulation=accumulation, seed=3, packing=packing)
        for epoch in range(2):
            steps = range(epoch * updates.per_epoch, (epoch + 1) * updates.per_epoch)
            seen = [name for step in steps for batch in updates[step] for name in batch.rows]
            assert sorted(seen) == sorted(r.where for r in ROWS)


def test_accumulation_splits_the_same_rows():
    whole, parts = (Updates(ROWS, batch_size=b, accumulation=a, seed=1) for b, a in ((4, 1), (1, 4)))
    for step in range(12):
        assert [name for batch in whole[step] for name in batch.rows] == [
            name for batch in parts[step] for name in batch.rows
        ]


def test_order_is_a_function_of_seed_and_epoch():
    first, again, other = (Updates(ROWS, batch_size=4, accumulation=1, seed=s) for s in (1, 1, 2))
    assert [first[s][0].rows for s in range(30)] == [again[s][0].rows for s in reversed(range(30))][::-1]
    assert [first[s][0].rows for s in range(10)] != [other[s][0].rows for s in range(10)]
    assert [first[s][0].rows for s in range(10)] != [first[s + 10][0].rows for s in range(10)]


def test_other_rows_meet_in_each_epoch():
    updates = Updates(ROWS, batch_size=4, accumulation=1, seed=1)
    first, second = ({frozenset(updates[step + at][0].rows) for step in range(10)} for at in (0, 10))
    assert len(first & second) < 3


@pytest.mark.parametrize("packing", [True, False])
def test_the_largest_update_comes_first(packing):
    """Not one that is left over and short, though it may hold the longest row."""
    lengths = np.random.default_rng(0).lognormal(4, 1, 37).astype(int).clip(3, 800)
    rows = [row(number, int(length)) for number, length in enumerate(lengths)]
    for seed in range(40):
        updates = Updates(rows, batch_size=4, accumulation=1, seed=seed, packing=packing)
        computed = [updates[step][0].num_computed for step in range(updates.per_epoch)]
        assert computed[0] == max(computed)


def test_padding_share_counts_real_tokens():
    updates = Updates(ROWS, batch_size=4, accumulation=1, seed=1)
    real = sum(len(r.ids) - 1 for r in ROWS)
    computed = sum(batch.inputs.size for step in range(updates.per_epoch) for batch in updates[step])
    assert abs(padding_share(updates, updates.per_epoch) - (1 - real / computed)) < 1e-12
