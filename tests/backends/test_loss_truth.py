"""The loss and its gradient against float64, on both backends: what a row costs that is drawn by chance, half learnt, learnt.

The exact values are computed from the logits as the backend's own product rounds them, so that nothing but the loss is measured.
What is left is the rounding of its sums (float32, V terms), and of the factors that multiply the head in the type of the
weights, and of the gradient in that type: half of the last bit, 2^-9 in bfloat16 and 2^-12 in float16.
"""

import numpy as np
import pytest

N, D, V = 24, 64, 4000
# Relative error of the gradient of a row: float32's last bit over V = 4,000 terms is 4e-6; in half precision each chunk's sum of
# products is rounded once more. Measured: 6e-6, 4e-4, 2.3e-3. A softmax in float32 is off by 0.02 in learnt rows; there was a fault of 0.23.
GRADIENT = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
LOSS = 2e-5  # nats: float32 sums of 4,000 terms, logits up to 25
SCALE = 4096.0  # of the gradient while it is computed: a learnt row's own would have no digits in float16
LEARNT = {"by chance": 0.0, "half learnt": 8.0, "learnt": 25.0}


def rows(learnt):
    """Hidden states (N, D), a head (V, D) and targets (N,) whose logit stands `LEARNT[learnt]` above the others' mean."""
    generator = np.random.default_rng(7)
    weight = generator.normal(size=(V, D)).astype(np.float32)
    hidden = generator.normal(size=(N, D)).astype(np.float32) * 0.3
    targets = generator.integers(0, V, N)
    own = weight[targets]
    hidden += own * ((LEARNT[learnt] - (hidden * own).sum(axis=1)) / (own * own).sum(axis=1))[:, None]
    return hidden, weight, targets.astype(np.int32)


def compute(name, dtype, hidden, weight, targets, chunk):
    """(logits, weight, log-probabilities, their gradients), float64, by one backend in one type."""
    if name == "torch":
        import torch

        from mlx_fish.backends.torch.loss import log_probs
        from mlx_fish.backends.torch.products import linear

        kind = getattr(torch, dtype)
        head, states = torch.tensor(weight).to(kind), torch.tensor(hidden).to(kind).requires_grad_()
        found = log_probs(head, states, torch.tensor(targets).long(), chunk)
        (SCALE * found).sum().backward()
        arrays = linear(states.detach(), head), head, found.detach(), states.grad
        return tuple(array.double().numpy() for array in arrays)
    import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
    import mlx.core as mx

    from mlx_fish.backends.mlx.loss import Head, make_log_probs

    kind = getattr(mx, dtype)
    head, states, ids = mx.array(weight).astype(kind), mx.array(hidden).astype(kind), mx.array(targets)
    log_probs = make_log_probs(Head(head), chunk)
    arrays = states @ head.T, head, log_probs(states, ids), mx.grad(lambda h: SCALE * log_probs(h, ids).sum())(states)
    return tuple(np.array(array.astype(mx.float32)).astype(np.float64) for array in arrays)


def exact(logits, weight, targets):
    """Log-probabilities of the targets (N,), and their gradients to the hidden states (N, D)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rest = -np.exp(log_probs)
    rest[np.arange(N), targets] = -np.expm1(log_probs[np.arange(N), targets])  # 1 - p without cancellation
    return log_probs[np.arange(N), targets], rest @ weight


@pytest.mark.parametrize("chunk", [None, 1000, 1333])
@pytest.mark.parametrize("learnt", LEARNT)
@pytest.mark.parametrize("dtype", GRADIENT)
def test_loss_and_gradient_are_those_of_float64(backend_name, dtype, learnt, chunk):
    hidden, weight, targets = rows(learnt)
    logits, weight, log_probs, gradient = compute(backend_name, dtype, hidden, weight, targets, chunk)
    expected, expected_gradient = exact(logits, weight, targets)
    assert (log_probs <= 1e-6).all(), "a probability above one"
    np.testing.assert_allclose(log_probs, expected, rtol=0, atol=LOSS)
    error = np.linalg.norm(gradient / SCALE - expected_gradient, axis=1) / np.linalg.norm(expected_gradient, axis=1)
    assert error.max() < GRADIENT[dtype]
