"""What is MLX's own: the sampler, which transformers' processors do for torch."""

import numpy as np
import torch


def test_sampling_keeps_what_transformers_keeps():
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
    import mlx.core as mx

    from mlx_fish.backends.mlx.generate import keep_top_k, keep_top_p

    scores = np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32) * 3
    for k, p in ((5, 0.9), (50, 0.3), (1, 1.0)):
        expected = (
            TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, torch.tensor(scores)))
            if p < 1
            else TopKLogitsWarper(k)(None, torch.tensor(scores))
        )
        ours = np.array(keep_top_p(keep_top_k(mx.array(scores), k), p))
        assert (np.isinf(ours) == np.isinf(expected.numpy())).all()
