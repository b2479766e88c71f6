"""What is MLX's own: the sampler, which transformers' processors do for torch, and the memory that MLX counts."""

import numpy as np
import torch
from fuse_models import make_adapter, make_model

from mlx_fish.backends.choose import load_backend
from mlx_fish.backends.protocol import Sampling, optimizer_step
from mlx_fish.data.batches import make_batch
from mlx_fish.data.tokens import Tokens


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


def test_checkpointing_needs_little_more_than_half_the_memory(tmp_path):
    """Sixteen blocks: one of them is always whole, and the head's share is small."""
    import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
    import mlx.core as mx

    model = make_model(tmp_path / "model", "qwen2", tied=True, num_blocks=16)
    adapter = make_adapter(tmp_path / "adapter", model)
    ids = np.random.default_rng(0).integers(0, 300, 601).astype(np.int32)
    row = Tokens(ids, np.arange(601) > 560, "a:1", cut=False)
    peaks = []
    for grad_checkpoint in (False, True):
        backend = load_backend(model, name="mlx")
        backend.attach(adapter.spec, adapter.arrays, grad_checkpoint=grad_checkpoint)
        optimizer_step(backend, [make_batch([row])], 0.0, [3])()
        held = mx.get_active_memory()
        backend.reset_peak_memory()
        optimizer_step(backend, [make_batch([row])], 0.0, [3])()
        peaks.append(backend.peak_memory() - held)
    assert peaks[1] < 0.55 * peaks[0]


def test_a_sampler_draws_one_key_a_token(monkeypatch):
    """The random keys of many long answers cost no more each than those of one short answer."""
    import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
    import mlx.core as mx

    from mlx_fish.backends.mlx.generate import make_sampler

    split, sizes = mx.random.split, []
    monkeypatch.setattr(mx.random, "split", lambda key, num=2: sizes.append(num) or split(key, num))
    sample = make_sampler(Sampling(temperature=1.0), row=500)
    ids = [int(sample(mx.zeros((1, 50)))[0]) for _ in range(20)]
    assert sizes == [2] * 20
    assert len(set(ids)) > 5, "every token draws anew"
    again = make_sampler(Sampling(temperature=1.0), row=500)
    assert [int(again(mx.zeros((1, 50)))[0]) for _ in range(20)] == ids
    other = make_sampler(Sampling(temperature=1.0), row=501)
    assert [int(other(mx.zeros((1, 50)))[0]) for _ in range(20)] != ids
