"""The single-pass loss against a plain NumPy computation and against torch's autograd."""

import numpy as np
import pytest
import torch

import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
import mlx.core as mx

from mlx_fish.backends.mlx.loss import Head, make_log_probs, token_losses, token_losses_and_gradients

N, D, V = 13, 64, 1000
RANDOM = np.random.default_rng(0)
HIDDEN = RANDOM.normal(size=(N, D)).astype(np.float32)
WEIGHT = RANDOM.normal(size=(V, D)).astype(np.float32)
TARGETS = RANDOM.integers(0, V, N).astype(np.int32)


def reference(hidden, weight, targets):
    """Losses (N,) and their gradients (N, D) in float64."""
    logits = hidden.astype(np.float64) @ weight.astype(np.float64).T
    logits -= logits.max(axis=1, keepdims=True)
    total = np.exp(logits).sum(axis=1, keepdims=True)
    probabilities = np.exp(logits) / total
    rows = np.arange(len(targets))
    losses = np.log(total[:, 0]) - logits[rows, targets]
    probabilities[rows, targets] -= 1
    return losses, probabilities @ weight.astype(np.float64)


@pytest.mark.parametrize("chunk", [7, 100, 333, 1000, 5000])
def test_equals_numpy_for_every_chunk_size(chunk):
    losses, gradient = token_losses_and_gradients(Head(mx.array(WEIGHT)), mx.array(HIDDEN), mx.array(TARGETS), chunk)
    expected, expected_gradient = reference(HIDDEN, WEIGHT, TARGETS)
    np.testing.assert_allclose(np.array(losses), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.array(gradient), expected_gradient, rtol=1e-4, atol=1e-5)
    alone = token_losses(Head(mx.array(WEIGHT)), mx.array(HIDDEN), mx.array(TARGETS), chunk)
    assert (np.array(alone) == np.array(losses)).all()


def test_gradient_equals_torch_autograd():
    weights = RANDOM.random(N).astype(np.float32)
    hidden = torch.tensor(HIDDEN, requires_grad=True)
    logits = hidden @ torch.tensor(WEIGHT).T
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(TARGETS).long(), reduction="none")
    (each * torch.tensor(weights)).sum().backward()
    log_probs = make_log_probs(Head(mx.array(WEIGHT)), 128)
    gradient = mx.grad(lambda h: -(log_probs(h, mx.array(TARGETS)) * mx.array(weights)).sum())(mx.array(HIDDEN))
    np.testing.assert_allclose(np.array(gradient), hidden.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow():
    losses, gradient = token_losses_and_gradients(Head(mx.array(WEIGHT)), mx.array(HIDDEN * 100), mx.array(TARGETS), 64)
    expected, _ = reference(HIDDEN * 100, WEIGHT, TARGETS)
    np.testing.assert_allclose(np.array(losses), expected, rtol=1e-5, atol=1e-2)
    assert np.isfinite(np.array(gradient)).all()


def test_the_tail_of_a_large_vocabulary_is_counted():
    """Added up one by one in float32, 150,000 small probabilities beside a large one are lost to rounding."""
    generator = np.random.default_rng(7)
    weight = generator.normal(size=(150_000, D)).astype(np.float32)
    hidden = generator.normal(size=(4, D)).astype(np.float32) / 8
    weight[0] = hidden[0] * (16 / (hidden[0] @ hidden[0]))
    hidden[1:] = hidden[0] + hidden[1:] / 100
    targets = np.array([5, 70_000, 0, 149_999], np.int32)
    expected, _ = reference(hidden, weight, targets)
    losses = token_losses(Head(mx.array(weight)), mx.array(hidden), mx.array(targets))
    np.testing.assert_allclose(np.array(losses), expected, atol=1e-5)


def test_what_is_learnt_has_a_small_loss_and_gradient_in_half_precision():
    """A target's logit of 16 is rounded by up to 0.06 in bfloat16: a loss of 0.01 must not take that for its own."""
    weight = mx.array(WEIGHT).astype(mx.bfloat16)
    hidden = (weight[mx.array(TARGETS)] * (16 / 64) + mx.array(HIDDEN) / 16).astype(mx.bfloat16)
    expected, expected_gradient = reference(*(np.array(a.astype(mx.float32)) for a in (hidden, weight)), TARGETS)
    losses, gradient = token_losses_and_gradients(Head(weight), hidden, mx.array(TARGETS), 100)
    assert 1e-4 < expected.mean() < 0.1
    np.testing.assert_allclose(np.array(losses).mean(), expected.mean(), rtol=0.02)
    error = np.linalg.norm(np.array(gradient) - expected_gradient) / np.linalg.norm(expected_gradient)
    assert error < 0.01


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_head(bits):
    packed, scales, biases = mx.quantize(mx.array(WEIGHT), group_size=64, bits=bits)
    dense = np.array(mx.dequantize(packed, scales, biases, group_size=64, bits=bits))
    head = Head(packed, scales, biases, 64, bits)
    losses, gradient = token_losses_and_gradients(head, mx.array(HIDDEN), mx.array(TARGETS), 256)
    expected, expected_gradient = reference(HIDDEN, dense, TARGETS)
    np.testing.assert_allclose(np.array(losses), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(np.array(gradient), expected_gradient, rtol=1e-4, atol=1e-4)
