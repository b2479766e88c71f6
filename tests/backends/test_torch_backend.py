"""What is torch's own: its loss, dropout without a global generator, half precision, and what it cannot read."""

import numpy as np
import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlx_fish.adapters.spec import AdapterSpec, choose_layers, initial_arrays
from mlx_fish.backends.choose import load_backend, load_quantizer
from mlx_fish.backends.limits import TORCH_POSITIONS
from mlx_fish.backends.protocol import optimizer_step
from mlx_fish.backends.torch import model as torch_model
from mlx_fish.backends.torch import products
from mlx_fish.backends.torch.loss import log_probs, token_losses
from mlx_fish.backends.torch.products import LoraLinear, freeze, linear
from mlx_fish.backends.torch.step import pieces
from mlx_fish.data.batches import make_batch
from mlx_fish.data.dataset import load_dataset
from mlx_fish.data.templates.template import choose_template
from mlx_fish.errors import FishError
from mlx_fish.models.convert import convert
from mlx_fish.models.folder import ModelFolder

N, D, V = 13, 64, 3000
RANDOM = np.random.default_rng(0)
HIDDEN = torch.tensor(RANDOM.normal(size=(N, D)).astype(np.float32))
WEIGHT = torch.tensor(RANDOM.normal(size=(V, D)).astype(np.float32))
TARGETS = torch.tensor(RANDOM.integers(0, V, N))
SHARES = torch.tensor(RANDOM.random(N).astype(np.float32))


def plain(hidden):
    """Losses and their weighted gradient by autograd over all logits, in float64."""
    hidden = hidden.double().requires_grad_()
    found = torch.nn.functional.cross_entropy(hidden @ WEIGHT.double().T, TARGETS, reduction="none")
    (found * SHARES).sum().backward()
    return found.detach(), hidden.grad


@pytest.mark.parametrize("chunk", [7, 1000, 2999, 3000, 5000, None])
@pytest.mark.parametrize("size", [1, 100])
def test_the_loss_equals_autograd_for_every_chunk_size(chunk, size):
    """Also with logits so large that an exponential would overflow."""
    hidden = (HIDDEN * size).requires_grad_()
    found = -log_probs(WEIGHT, hidden, TARGETS, chunk)
    (found * SHARES).sum().backward()
    expected, gradient = plain(HIDDEN * size)
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-5 * size**2)
    torch.testing.assert_close(hidden.grad.double(), gradient, rtol=1e-4, atol=1e-5)


def test_the_loss_alone_costs_no_gradient():
    found, gradient = token_losses(WEIGHT, HIDDEN, TARGETS, with_gradient=False)
    assert gradient is None
    torch.testing.assert_close(found.double(), plain(HIDDEN)[0], rtol=1e-5, atol=1e-5)


def test_the_logits_of_the_whole_vocabulary_never_exist():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            out = function(*arguments, **(named or {}))
            if out.untyped_storage().data_ptr() != WEIGHT.untyped_storage().data_ptr():  # a view takes no memory
                self.size = max(self.size, out.numel())
            return out

    hidden = HIDDEN.clone().requires_grad_()
    with Largest() as largest:
        log_probs(WEIGHT, hidden, TARGETS, 1000).sum().backward()
    assert N * 1000 <= largest.size < N * V


@pytest.fixture(params=[True, False], ids=["onednn", "plain"])
def onednn(request, monkeypatch):
    """Each way to multiply, where this CPU has both."""
    monkeypatch.setattr(products, "_ONEDNN", request.param and products._ONEDNN)


@pytest.mark.parametrize("num_rows", [1, 13])
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_products_equal_exact_ones(onednn, num_rows, bias):
    """Also of a transposed view, which the backward pass multiplies with."""
    generator = torch.Generator().manual_seed(0)
    x, weight, offset = (torch.randn(*shape, generator=generator) for shape in ((num_rows, 3, 96), (200, 96), (200,)))
    exact = x.double() @ weight.double().T + (offset.double() if bias else 0)
    for given in (weight, weight.T.contiguous().T):
        found = linear(x, given, offset if bias else None)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 * exact.abs().max().item())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("known", [True, False], ids=["inner", "first"])
def test_lora_layers_equal_those_of_peft(onednn, bias, known):
    """Output and all gradients, against PEFT's own forward; `first` is a layer whose input asks for no gradient."""
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(96, 200, bias=bias))
    tuner = peft.LoraModel(base, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"]), "default")
    freeze(base[0].base_layer)
    layer = base[0].eval()
    torch.nn.init.normal_(layer.lora_B["default"].weight, generator=generator)
    x = torch.randn(2, 13, 96, generator=generator).requires_grad_(known)
    upstream = torch.randn(2, 13, 200, generator=generator)
    wanted = [*([x] if known else []), layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    results = []
    for kind in (peft.tuners.lora.Linear, LoraLinear):
        layer.__class__ = kind
        out = layer(x)
        assert (type(out.grad_fn).__name__ == "_LoraLinearFunctionBackward") == (kind is LoraLinear)
        results.append([out.detach(), *torch.autograd.grad(out, wanted, upstream)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * theirs.abs().max().item())
    tuner.disable_adapter_layers()
    assert torch.equal(layer(x), layer.base_layer(x))


def test_every_layer_of_a_model_computes_so(tiny):
    backend = attached(tiny)
    adapted = [module for module in backend.model.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert {type(module) for module in adapted} == {LoraLinear}
    ids = torch.arange(5, 40)[None]
    names = set()

    def collect(node):
        if node is not None and node not in names:
            names.add(node)
            for following, _ in node.next_functions:
                collect(following)

    collect(backend.model.model(ids).last_hidden_state.grad_fn)
    found = sum(type(node).__name__ == "_LoraLinearFunctionBackward" for node in names)
    assert found == len(adapted) > 0


@pytest.fixture(scope="module")
def rows(tiny, tokenizer):
    template = choose_template("auto", tokenizer, tiny)
    return [template.tokens(example, 2048) for example in load_dataset("fish_care").splits["train"][:6]]


@pytest.mark.parametrize("limit", [1, 150, 10_000])
def test_pieces_hold_every_label_once_in_its_context(rows, limit):
    batch = make_batch(rows)
    width = batch.inputs.shape[1]
    labels = [
        (tuple(batch.inputs[position // width, : position % width + 1]), target)
        for position, target, weight in zip(batch.positions, batch.targets, batch.weights, strict=True)
        if weight
    ]
    found, sizes = [], []
    for piece in pieces(batch, limit):
        sizes.append(piece.inputs.size)
        assert piece.inputs.size <= limit or len(piece.inputs) == 1
        for position, target in zip(piece.positions, piece.targets, strict=True):
            row, column = divmod(position, piece.inputs.shape[1])
            found.append((tuple(piece.inputs[row, : column + 1]), target))
    assert sorted(found) == sorted(labels)
    assert len(sizes) == {1: len(rows), 10_000: 1}.get(limit, len(sizes))
    assert sum(sizes) <= batch.num_computed


def test_pieces_change_neither_loss_nor_gradient(tiny, rows, monkeypatch):
    found = []
    for limit in (1, 150, 10_000):
        monkeypatch.setitem(TORCH_POSITIONS, "cpu", limit)
        backend = attached(tiny)
        result = optimizer_step(backend, [make_batch(rows)], 1e-3, [0])()
        found.append((result.loss, result.grad_norm, backend.evaluate(make_batch(rows))))
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)


def attached(tiny, *, dropout=0.0):
    spec = AdapterSpec.uniform(choose_layers(tiny.linear_layers), rank=4, alpha=8, dropout=dropout)
    backend = load_backend(tiny, name="torch")
    backend.attach(spec, initial_arrays(spec, 1))
    return backend


def test_no_global_generator_is_drawn_from(tiny, rows):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    optimizer_step(attached(tiny, dropout=0.3), [make_batch(rows[:2])], 1e-3, [7])()
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluating_does_not_drop(tiny, rows):
    backend, plain_backend = attached(tiny, dropout=0.5), attached(tiny)
    backend.attach(backend._layers.spec, started := trained_arrays(plain_backend, rows))
    plain_backend.attach(plain_backend._layers.spec, started)
    batch = make_batch(rows)
    assert backend.evaluate(batch) == plain_backend.evaluate(batch)
    assert optimizer_step(backend, [batch], 0.0, [1])().loss != optimizer_step(plain_backend, [batch], 0.0, [1])().loss


def trained_arrays(backend, rows):
    """An adapter whose B is no longer zero."""
    for _ in range(3):
        optimizer_step(backend, [make_batch(rows)], 1e-2, [0])()
    return backend.adapter_arrays()


@pytest.mark.slow
def test_half_precision_keeps_float32_masters(tiny, rows, monkeypatch):
    """As on a GPU: the layers compute in bfloat16, and updates too small for it still add up."""
    exact = attached(tiny)
    monkeypatch.setattr(torch_model, "choose_dtype", lambda stored, device: torch.bfloat16)
    half = attached(tiny)
    assert (exact.dtype, half.dtype) == ("float32", "bfloat16")
    batch = make_batch(rows)
    for _ in range(5):
        one, other = optimizer_step(exact, [batch], 1e-3, [0])(), optimizer_step(half, [batch], 1e-3, [0])()
        assert abs(one.loss - other.loss) < 2e-2 * one.loss
    layers = half._layers
    assert layers.master.dtype == torch.float32
    assert not torch.equal(layers.master.bfloat16().float(), layers.master)
    for key, matrix in zip(layers.layout.keys, layers.tensors, strict=True):
        assert torch.equal(matrix.detach(), torch.tensor(half.adapter_arrays()[key]).bfloat16())


@pytest.mark.parametrize(
    ("stored", "device", "expected"),
    [("bfloat16", "cpu", torch.float32), ("float16", "mps", torch.float32), ("bfloat16", "mps", torch.bfloat16)],
)
def test_the_dtype_suits_the_device(stored, device, expected):
    assert torch_model.choose_dtype(stored, torch.device(device)) == expected


def test_a_folder_quantised_by_mlx_says_what_to_do(tiny, tmp_path):
    made = convert(model="tiny", out=tmp_path / "q", quantizer=load_quantizer(4, 64))
    with pytest.raises(FishError, match=r"quantised by MLX.*--model tiny.*--backend mlx"):
        load_backend(ModelFolder(made.path, "tiny"), name="torch")


def test_a_folder_without_a_tensor_is_refused(tmp_path):
    from tiny_folders import weights, write_folder

    arrays = weights()
    del arrays["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(FishError, match=r"has no model.layers.1.mlp.up_proj.weight"):
        load_backend(ModelFolder(write_folder(tmp_path / "m", arrays), "m"), name="torch")


def test_a_converted_folder_computes_what_its_source_does(tiny, tmp_path):
    made = convert(model="tiny", out=tmp_path / "base", dtype="float32")
    ids = np.arange(5, 40, dtype=np.int32)
    expected = load_backend(tiny, name="torch").logits(ids)
    assert (load_backend(ModelFolder(made.path, "tiny"), name="torch").logits(ids) == expected).all()


def test_the_gradient_waits_for_no_result(tiny, rows, monkeypatch):
    """On a GPU, reading a number waits until it is computed: once an update, not once a piece. (transformers looks once a forward
    whether the positions that it made up itself are those of packed rows; that is its own.)"""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*arguments, **(named or {}))

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    monkeypatch.setitem(TORCH_POSITIONS, "cpu", 1)
    backend, batch = attached(tiny), make_batch(rows)
    assert len(list(pieces(batch, 1))) == len(rows) > 2
    with Reads() as reads:
        gradient = backend.gradient([batch], batch.num_supervised, [0])
    assert reads.count == 0
    with Reads() as reads:
        backend.update(gradient, 1e-3)()
    assert reads.count <= 3  # the loss, the norm, AdamW's step
