"""Every backend on the tiny model: gradients, accumulation, padding, optimizer, generation, against independent computations."""

import dataclasses

import numpy as np
import pytest
import torch

from mlx_fish.adapters.spec import AdapterSpec, choose_layers, initial_arrays, tensor_key
from mlx_fish.backends.choose import load_backend
from mlx_fish.backends.protocol import Sampling, optimizer_step
from mlx_fish.data.batches import Capacity, make_batch
from mlx_fish.data.dataset import load_dataset
from mlx_fish.data.examples import Turn
from mlx_fish.data.templates.template import choose_template
from mlx_fish.data.tokens import Tokens
from mlx_fish.errors import FishError

pytestmark = pytest.mark.usefixtures("backend_name")  # each test once on MLX and once on torch


@pytest.fixture(scope="module")
def template(tiny, tokenizer):
    return choose_template("auto", tokenizer, tiny)


@pytest.fixture(scope="module")
def rows(template):
    """Rows that the tiny model was not taught: those it knows by heart have gradients of mere rounding."""
    return [template.tokens(example, 2048) for example in load_dataset("fish_care").splits["train"][1:16:2]]


@pytest.fixture(scope="module")
def spec(tiny):
    return AdapterSpec.uniform(choose_layers(tiny.linear_layers), rank=4, alpha=8)


@pytest.fixture
def backend(tiny, spec):
    backend = load_backend(tiny)
    backend.attach(spec, started(spec))
    return backend


def started(spec):
    """An adapter whose B is not zero, so that every gradient is."""
    arrays = initial_arrays(spec, 1)
    generator = np.random.default_rng(2)
    return {
        key: array if ".lora_A." in key else generator.normal(0, 0.05, array.shape).astype(np.float32)
        for key, array in arrays.items()
    }


def torch_model(tiny, spec, arrays):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)
    targets = sorted({module.rsplit(".", 1)[-1] for module in spec.layers})
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.tensor(arrays[name.replace(".default", "")])
    return model


def torch_loss(model, rows):
    """Mean loss over the supervised tokens of the rows, one row at a time: no padding, no packing."""
    total, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor(row.ids[None, :-1]).long()).logits[0]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[1:]).long(), reduction="none")
        kept = torch.tensor(row.supervised[1:])
        total, count = total + each[kept].sum(), count + int(kept.sum())
    return total / count


def test_one_step_equals_torch_and_peft(tiny, spec, backend, rows):
    """Loss, gradient norm, clipping and AdamW: after one update every matrix is where torch's own optimizer puts it."""
    model = torch_model(tiny, spec, started(spec))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch_loss(model, rows[:3])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        result = optimizer_step(backend, [make_batch(rows[:3])], 1e-3, [0])()
        assert abs(result.loss - loss.item()) < 2e-5 * loss.item()
        assert abs(result.grad_norm - norm.item()) < 1e-3 * norm.item()
    ours = backend.adapter_arrays()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            np.testing.assert_allclose(ours[name.replace(".default", "")], parameter.detach().numpy(), atol=2e-4)


def test_a_large_gradient_is_clipped_to_norm_one(tiny, rows):
    """AdamW hardly shows it in the weights (a constant factor cancels), so the first moment is looked at."""
    spec = AdapterSpec.uniform(choose_layers(tiny.linear_layers), rank=4, alpha=80)
    backend = load_backend(tiny)
    backend.attach(spec, started(spec))
    result = optimizer_step(backend, [make_batch(rows[:2])], 1e-3, [0])()
    assert result.grad_norm > 1.5
    moments = [array for key, array in backend.optimizer_arrays().items() if key.startswith("m.")]
    norm = np.sqrt(sum(float((array.astype(np.float64) ** 2).sum()) for array in moments))
    assert abs(norm - 0.1) < 1e-4  # (1 - beta1) times a gradient of norm 1


def test_the_logits_equal_transformers_and_peft(tiny, spec, backend, rows):
    ids = rows[0].ids
    with torch.no_grad():
        expected = torch_model(tiny, spec, started(spec))(torch.tensor(ids[None]).long()).logits[0].numpy()
    assert np.abs(backend.logits(ids) - expected).max() < 1e-4


def test_four_micro_batches_equal_one_batch(tiny, spec, rows):
    changed = []
    for parts in ([rows[:4]], [[row] for row in rows[:4]]):
        backend = load_backend(tiny)
        backend.attach(spec, started(spec))
        result = optimizer_step(backend, [make_batch(part) for part in parts], 1e-3, [0] * len(parts))()
        changed.append((result, backend.adapter_arrays()))
    (one, arrays), (four, more) = changed
    assert len({row.num_supervised for row in rows[:4]}) > 1, "unequal lengths, or a mean of means would pass"
    assert abs(one.loss - four.loss) < 1e-5 * one.loss
    assert abs(one.grad_norm - four.grad_norm) < 1e-4 * one.grad_norm
    for key, array in arrays.items():
        np.testing.assert_allclose(array, more[key], atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_computes_the_same(tiny, rows, dropout, backend_name):
    if dropout and backend_name == "torch":
        with pytest.raises(FishError, match="--grad-checkpoint with --lora-dropout"):
            load_backend(tiny).attach(AdapterSpec("lora", {}, dropout), {}, grad_checkpoint=True)
        return
    spec = AdapterSpec.uniform(choose_layers(tiny.linear_layers), rank=4, alpha=8, dropout=dropout)
    found = []
    for grad_checkpoint in (False, True):
        backend = load_backend(tiny)
        backend.attach(spec, started(spec), grad_checkpoint=grad_checkpoint)
        found.append((optimizer_step(backend, [make_batch(rows)], 1e-3, [3])(), backend.adapter_arrays()))
    (plain, arrays), (checkpointed, more) = found
    assert abs(plain.loss - checkpointed.loss) < 1e-6 * plain.loss
    assert abs(plain.grad_norm - checkpointed.grad_norm) < 1e-5 * plain.grad_norm
    for key, array in arrays.items():
        np.testing.assert_allclose(array, more[key], atol=1e-4)


def test_padding_changes_nothing(backend, rows):
    batch = make_batch(rows[:1])
    wide = np.full((1, batch.inputs.shape[1] + 40), 7, np.int32)
    wide[0, : batch.num_tokens] = batch.inputs[0, : batch.num_tokens]
    padded = dataclasses.replace(batch, inputs=wide)
    assert abs(backend.evaluate(batch) / backend.evaluate(padded) - 1) < 1e-6


def test_packed_rows_compute_what_padded_rows_do(tiny, backend_name, spec, rows):
    found = []
    for packing in (True, False):
        backend = load_backend(tiny, name=backend_name)
        backend.attach(spec, started(spec))
        batch = make_batch(rows[:4], packing=packing)
        loss = backend.evaluate(batch) / batch.num_supervised
        result = optimizer_step(backend, [batch], 1e-3, [3])()
        assert abs(result.loss - loss) < 1e-5 * loss
        found.append((result, backend.adapter_arrays()))
    (packed, arrays), (padded, more) = found
    assert abs(packed.loss - padded.loss) < 1e-5 * padded.loss
    assert abs(packed.grad_norm - padded.grad_norm) < 1e-4 * padded.grad_norm
    for key, array in arrays.items():
        np.testing.assert_allclose(array, more[key], atol=1e-4)


def test_a_packed_row_sees_itself_alone(backend, rows):
    """Whoever lies before and behind: a leak of attention, or positions that run on, would change the sum."""
    alone = sum(backend.evaluate(make_batch([row])) for row in rows[:5])
    for order in (rows[:5], rows[4::-1]):
        together = backend.evaluate(make_batch(order, packing=True, capacity=Capacity(1200, 400, 800)))
        assert abs(together - alone) < 1e-5 * alone


def test_a_fresh_adapter_computes_the_base(tiny, spec, rows):
    backend = load_backend(tiny)
    ids = rows[0].ids
    base = backend.logits(ids)
    loss = backend.evaluate(make_batch(rows[:2]))
    backend.attach(spec, initial_arrays(spec, 0))
    assert (backend.logits(ids) == base).all()
    assert backend.evaluate(make_batch(rows[:2])) == loss
    first = optimizer_step(backend, [make_batch(rows[:2])], 0.0, [0])()
    assert abs(first.loss / (loss / make_batch(rows[:2]).num_supervised) - 1) < 1e-6


def test_switching_the_adapter_off_gives_the_base(tiny, backend, rows):
    base = load_backend(tiny).logits(rows[0].ids)
    tuned = backend.logits(rows[0].ids)
    backend.use_adapter(False)
    assert (backend.logits(rows[0].ids) == base).all()
    backend.use_adapter(True)
    assert (backend.logits(rows[0].ids) == tuned).all()
    assert np.abs(tuned - base).max() > 1e-2


def test_a_non_finite_loss_changes_nothing(tiny, spec, rows):
    backend = load_backend(tiny)
    arrays = started(spec)
    module = next(iter(spec.layers))
    arrays[tensor_key(module, "lora_B")] = np.full_like(arrays[tensor_key(module, "lora_B")], np.nan)
    backend.attach(spec, arrays)
    result = optimizer_step(backend, [make_batch(rows[:1])], 1e-3, [0])()
    assert not result.updated
    after = backend.adapter_arrays()
    assert (after[tensor_key(module, "lora_A")] == arrays[tensor_key(module, "lora_A")]).all()
    assert all((array == 0).all() for array in backend.optimizer_arrays().values())


def test_resuming_from_the_moments_is_exact(tiny, spec, rows):
    batches = [make_batch(rows[i : i + 2]) for i in (0, 2, 4, 6)]
    straight = load_backend(tiny)
    straight.attach(spec, started(spec))
    losses = [optimizer_step(straight, [batch], 1e-3, [0])().loss for batch in batches]
    first = load_backend(tiny)
    first.attach(spec, started(spec))
    resumed_losses = [optimizer_step(first, [batch], 1e-3, [0])().loss for batch in batches[:2]]
    second = load_backend(tiny)
    second.attach(spec, first.adapter_arrays())
    second.restore_optimizer(first.optimizer_arrays(), 2)
    resumed_losses += [optimizer_step(second, [batch], 1e-3, [0])().loss for batch in batches[2:]]
    assert [loss.hex() for loss in losses] == [loss.hex() for loss in resumed_losses]
    for key, array in straight.adapter_arrays().items():
        assert (array == second.adapter_arrays()[key]).all()


def test_dropout_depends_on_its_seed_alone(tiny, rows):
    spec = AdapterSpec.uniform(choose_layers(tiny.linear_layers), rank=4, alpha=8, dropout=0.5)
    losses = []
    for seed in (1, 1, 2):
        backend = load_backend(tiny)
        backend.attach(spec, started(spec))
        losses.append(optimizer_step(backend, [make_batch(rows[:2])], 0.0, [seed])().loss)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_answers_equal_transformers(tiny, template, penalty):
    from transformers import AutoModelForCausalLM

    prompt = template.prompt_ids((Turn("user", "金鱼为什么容易浮头？"),))
    ours = list(load_backend(tiny).generate(prompt, Sampling(40, repetition_penalty=penalty), [template.end_token_id]))
    model = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)
    model.generation_config.eos_token_id = template.end_token_id
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, repetition_penalty=penalty, pad_token_id=0
    )
    theirs = [token for token in out[0, len(prompt) :].tolist() if token != template.end_token_id]
    assert ours == theirs


def test_a_batch_answers_as_one_by_one(tiny, template):
    backend = load_backend(tiny)
    prompts = [
        template.prompt_ids((Turn("user", text),)) for text in ("金鱼浮头", "新手适合养什么淡水观赏鱼？", "换水")
    ]
    sampling = Sampling(24, repetition_penalty=1.2)
    alone = [list(backend.generate(prompt, sampling, [template.end_token_id])) for prompt in prompts]
    assert backend.generate_batch(prompts, sampling, [template.end_token_id]) == alone


def test_a_sampled_answer_depends_on_its_seed_alone(tiny, template):
    backend = load_backend(tiny)
    prompts = [template.prompt_ids((Turn("user", text),)) for text in ("新手适合养什么淡水观赏鱼？", "换水")]
    sampling = Sampling(16, temperature=1.0, top_k=40, top_p=0.9, seed=3)
    alone = list(backend.generate(prompts[0], sampling, []))
    assert list(backend.generate(prompts[0], sampling, [])) == alone
    assert backend.generate_batch(prompts, sampling, [])[0] == alone
    assert list(backend.generate(prompts[0], dataclasses.replace(sampling, seed=4), [])) != alone


def test_every_architecture_meets_its_own_head(pair):
    """Tied and untied, qwen2 and llama: the loss over gathered rows is that of the plain model's logits."""
    base, adapter = pair
    backend = load_backend(base)
    backend.attach(adapter.spec, adapter.arrays)
    ids = np.array([1, 5, 9, 33, 71, 2, 64, 8], np.int32)
    row = Tokens(ids, np.array([False] * 4 + [True] * 4), cut=False, where="here:1")
    logits = torch.tensor(backend.logits(ids[:-1]))
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]).long(), reduction="none")
    assert abs(backend.evaluate(make_batch([row])) - each[3:].sum().item()) < 1e-4


def test_an_id_outside_the_vocabulary_is_refused(tiny, backend):
    """Never clipped to the last one."""
    size = tiny.config["vocab_size"]
    for ids in ([1, 2, 3, size], [1, size, 3, 4]):
        wrong = make_batch([Tokens(np.array(ids, np.int32), np.array([False, True, True, True]), "here:1")])
        with pytest.raises(ValueError, match=f"id {size} is outside the vocabulary of {size}"):
            optimizer_step(backend, [wrong], 1e-3, [0])
        with pytest.raises(ValueError, match="outside the vocabulary"):
            backend.evaluate(wrong)


def test_the_base_is_measured_without_the_adapter_whatever_came_before(tiny, backend, rows):
    batch = make_batch(rows[:2])
    base = load_backend(tiny).evaluate(batch)
    backend.logits(rows[0].ids)  # leaves the adapter in the layers
    backend.use_adapter(False)
    assert backend.evaluate(batch) == base
    backend.use_adapter(True)
    assert abs(backend.evaluate(batch) / base - 1) > 1e-3


def test_a_second_adapter_takes_the_first_ones_place(tiny, spec, backend, rows):
    expected = backend.logits(rows[0].ids)
    narrow = AdapterSpec.uniform(choose_layers(tiny.linear_layers, target="q_proj", num_layers=1), rank=2, alpha=4)
    backend.attach(narrow, started(narrow))
    assert set(backend.adapter_arrays()) == set(started(narrow))
    assert np.abs(backend.logits(rows[0].ids) - expected).max() > 1e-2
    backend.attach(spec, started(spec))
    assert (backend.logits(rows[0].ids) == expected).all()


def test_the_peak_of_memory_is_counted(backend, rows):
    backend.reset_peak_memory()
    optimizer_step(backend, [make_batch(rows)], 1e-3, [0])()
    assert backend.peak_memory() > 4_000_000  # the weights in float32 alone


def values_of(gradient):
    """(loss, (P,) float64) of a framework's gradient."""
    loss, values = gradient.loss, gradient.values
    return float(loss.item()), np.array(values.tolist(), np.float64)


@pytest.mark.parametrize("packing", [True, False])
def test_the_weights_of_labels_are_numbers(backend, spec, rows, packing):
    """The loss is the weighted sum of -log p over the labels, and the gradient is linear in the weights; a weight of 0 is none."""
    backend.attach(spec, started(spec))
    batch = make_batch(rows[:4], packing=packing)
    generator = np.random.default_rng(3)
    weights = np.where(batch.weights > 0, generator.choice([0.0, 0.25, 0.6, 1.7], len(batch.weights)), 0).astype(
        np.float32
    )
    weighted = dataclasses.replace(batch, weights=weights)
    expected = 0.0
    for number, row in enumerate(rows[:4]):
        logits = backend.logits(row.ids[:-1]).astype(np.float64)
        log_probs = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        labelled = np.flatnonzero(row.supervised[1:])
        own = weights[: batch.num_supervised][batch.owners[: batch.num_supervised] == number]
        expected -= (own * log_probs[labelled, row.ids[1:][labelled]]).sum()
    assert abs(backend.evaluate(weighted) / expected - 1) < 1e-5
    loss, gradient = values_of(backend.gradient([weighted], 10, [0]))
    assert abs(loss / (expected / 10) - 1) < 1e-5
    parts = [dataclasses.replace(batch, weights=part) for part in (weights * 0.25, weights * 0.75)]
    summed = sum(values_of(backend.gradient([part], 10, [0]))[1] for part in parts)
    scale = np.abs(gradient).max()
    assert scale > 0 and np.abs(summed - gradient).max() < 1e-5 * scale
    whole = values_of(backend.gradient([batch], 10, [0]))[1]
    assert np.abs(whole - gradient).max() > 0.1 * scale, "the weights change nothing"


def test_owners_name_the_row_of_each_label(rows):
    for packing in (True, False):
        batch = make_batch(rows[:5], packing=packing)
        counts = np.bincount(batch.owners[batch.weights > 0], minlength=5)
        assert counts.tolist() == [row.num_supervised for row in rows[:5]]
        assert (np.diff(batch.owners[batch.weights > 0]) >= 0).all()
