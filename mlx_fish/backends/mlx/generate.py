"""Text generation with an mlx-lm model, sampling as in transformers, with explicit random keys."""

from collections.abc import Callable, Iterator, Sequence

import mlx_fish.backends.mlx.runtime  # noqa: F401  isort: skip
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.sample_utils import make_repetition_penalty

from mlx_fish.backends.protocol import Sampling

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]
# By default mlx-lm penalises only the last 20 tokens; transformers penalises the prompt and the whole answer.
_FULL_CONTEXT = 1 << 30


def make_sampler(sampling: Sampling, *, row: int = 0) -> Sampler:
    """Return a function that samples token ids: log-probabilities (1, V) -> ids (1,).

    The random numbers depend on the seed and on `row`, the row's index among all prompts, but not on the other rows.
    """
    if sampling.temperature == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    # Each row has its own chain of keys and does not use MLX's global generator.
    key = mx.random.key(int(np.random.SeedSequence([sampling.seed, row]).generate_state(1)[0]))

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, sample_key = mx.random.split(key)
        scores = keep_top_p(
            keep_top_k(logprobs.astype(mx.float32) / sampling.temperature, sampling.top_k), sampling.top_p
        )
        return mx.random.categorical(scores, key=sample_key)

    return sample


def keep_top_k(scores: mx.array, top_k: int) -> mx.array:
    """Set all but the `top_k` largest scores (..., V) to -inf; 0: keep all."""
    if top_k <= 0 or top_k >= scores.shape[-1]:
        return scores
    kth = mx.min(mx.topk(scores, top_k, axis=-1), axis=-1, keepdims=True)
    return mx.where(scores < kth, -mx.inf, scores)


def keep_top_p(scores: mx.array, top_p: float) -> mx.array:
    """Keep the smallest set of most probable tokens whose probabilities add up to `top_p`; set the others to -inf.

    Args:
        scores: (..., V).
        top_p: 0 to 1; 1: keep all. The most probable token is always kept.
    """
    if top_p >= 1:
        return scores
    order = mx.argsort(scores, axis=-1)
    cumulative = mx.cumsum(mx.softmax(mx.take_along_axis(scores, order, axis=-1), axis=-1), axis=-1)
    drop = cumulative <= 1 - top_p
    drop[..., -1] = False
    ranks = mx.argsort(order, axis=-1)
    return mx.where(mx.take_along_axis(drop, ranks, axis=-1), -mx.inf, scores)


def _processors(sampling: Sampling) -> list[Processor]:
    if sampling.repetition_penalty == 1.0:
        return []
    return [make_repetition_penalty(sampling.repetition_penalty, context_size=_FULL_CONTEXT)]


def generate(model: nn.Module, prompt: Sequence[int], sampling: Sampling, end_ids: Sequence[int]) -> Iterator[int]:
    """Yield the token ids of one answer, without the end id."""
    steps = generate_step(
        mx.array(list(prompt)),
        model,
        max_tokens=sampling.max_tokens,
        sampler=make_sampler(sampling),
        logits_processors=_processors(sampling),
    )
    for token, _ in steps:
        if int(token) in end_ids:
            return
        yield int(token)


def generate_batch(
    model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, end_ids: Sequence[int]
) -> list[list[int]]:
    """Return the token ids of one answer per prompt, without end ids.

    Many rows are computed at a time, and the next prompt takes the place of a finished row.
    """
    generator = BatchGenerator(model, stop_tokens=[[end] for end in end_ids])
    uids = generator.insert(
        [list(prompt) for prompt in prompts],
        [sampling.max_tokens] * len(prompts),
        samplers=[make_sampler(sampling, row=row) for row in range(len(prompts))],
        logits_processors=[_processors(sampling) for _ in prompts],
    )
    answers: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            if response.finish_reason != "stop":
                answers[response.uid].append(int(response.token))
    generator.close()
    return [answers[uid] for uid in uids]
