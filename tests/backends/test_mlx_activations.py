"""SwiGLU's own backward against torch's autograd, and the exponential against NumPy's."""

import numpy as np
import torch

import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
import mlx.core as mx

from mlx_fish.backends.mlx.activations import exp, swiglu

RANDOM = np.random.default_rng(3)
GATE = (RANDOM.normal(size=(6, 40)) * 5).astype(np.float32)
UP = RANDOM.normal(size=(6, 40)).astype(np.float32)


def test_exp_is_as_exact_as_float32_allows():
    x = np.concatenate([np.linspace(-80, 20, 5001), [0.0, -np.inf]]).astype(np.float32)
    np.testing.assert_allclose(np.array(exp(mx.array(x))), np.exp(x.astype(np.float64)), rtol=4e-6)


def test_swiglu_and_its_gradients_equal_torch():
    gate, up = torch.tensor(GATE, requires_grad=True), torch.tensor(UP, requires_grad=True)
    expected = torch.nn.functional.silu(gate) * up
    (expected * torch.tensor(UP)).sum().backward()
    for compiled in (False, True):
        gradients = mx.grad(lambda g, u: (swiglu(g, u) * mx.array(UP)).sum(), argnums=(0, 1))
        ours = (mx.compile(gradients) if compiled else gradients)(mx.array(GATE), mx.array(UP))
        for mine, theirs in zip(ours, (gate.grad, up.grad), strict=True):
            np.testing.assert_allclose(np.array(mine), theirs.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        np.array(swiglu(mx.array(GATE), mx.array(UP))), expected.detach().numpy(), rtol=1e-5, atol=1e-6
    )


def test_far_out_gates_stay_finite():
    gate = mx.array([[-200.0, 200.0, -90.0, 90.0]])
    values = swiglu(gate, mx.ones_like(gate))
    gradient = mx.grad(lambda g: swiglu(g, mx.ones_like(g)).sum())(gate)
    np.testing.assert_allclose(np.array(values), [[0, 200, 0, 90]], atol=1e-6)
    np.testing.assert_allclose(np.array(gradient), [[0, 1, 0, 1]], atol=1e-6)
