"""Text generation with a transformers model: its cache and logits processors, with one random generator per row."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn as nn
from transformers import DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mlx_fish.backends.protocol import Sampling

MAX_BATCH_SIZE = 16  # prompts answered at a time


class TokenSampler:
    """The sampler of one row's token ids.

    The random numbers depend on the seed and on `row`, the row's index among all prompts, but not on the other rows.
    """

    def __init__(self, prompt: Sequence[int], sampling: Sampling, *, row: int):
        self.ids = list(prompt)
        self.greedy = sampling.temperature == 0
        self.processors = processors(sampling)
        seed = int(np.random.SeedSequence([sampling.seed, row]).generate_state(1)[0])
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device

    def __call__(self, logits: torch.Tensor) -> int:
        """Sample a token id from logits (V,), and record it for the repetition penalty."""
        scores = self.processors(torch.tensor([self.ids], device=logits.device), logits[None].float())
        if self.greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self.generator))
        self.ids.append(token)
        return token


def processors(sampling: Sampling) -> LogitsProcessorList:
    """Return the logits processors, in this order: repetition penalty, temperature, top-k, top-p."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 0:
        chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            chain.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            chain.append(TopPLogitsWarper(sampling.top_p))
    return chain


class Decoder:
    """A decoder of a batch of B rows with one key-value cache.

    Rows are padded on the left, so that the last token of every row is in the last column.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]):
        longest = max(len(prompt) for prompt in prompts)
        device = next(model.parameters()).device
        self.model = model
        self.cache = DynamicCache(config=model.config)
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        attended = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self.inputs = torch.tensor(padded, device=device)
        self.mask = torch.tensor(attended, device=device)

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        """Return the logits (B, V) of the next token of every row."""
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.inputs.shape[1] :]
        output = self.model(
            input_ids=self.inputs,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def append(self, ids: Sequence[int]) -> None:
        """Append one token id to every row."""
        self.inputs = torch.tensor(ids, device=self.mask.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.inputs)], dim=-1)


def generate(model: nn.Module, prompt: Sequence[int], sampling: Sampling, end_ids: Sequence[int]) -> Iterator[int]:
    """Yield the token ids of one answer, without the end id."""
    decoder, sample = Decoder(model, [prompt]), TokenSampler(prompt, sampling, row=0)
    for _ in range(sampling.max_tokens):
        token = sample(decoder.logits()[0])
        if token in end_ids:
            return
        yield token
        decoder.append([token])


def generate_batch(
    model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, end_ids: Sequence[int]
) -> list[list[int]]:
    """Return the token ids of one answer per prompt, without end ids.

    MAX_BATCH_SIZE prompts are computed at a time, sorted by length to reduce padding.
    """
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), MAX_BATCH_SIZE):
        rows = order[start : start + MAX_BATCH_SIZE]
        samplers = [TokenSampler(prompts[row], sampling, row=row) for row in rows]
        answers.update(
            zip(rows, _answer(model, [prompts[row] for row in rows], samplers, sampling, end_ids), strict=True)
        )
    return [answers[index] for index in range(len(prompts))]


def _answer(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    samplers: Sequence[TokenSampler],
    sampling: Sampling,
    end_ids: Sequence[int],
) -> list[list[int]]:
    """Return the token ids of one answer per prompt, all computed in one batch."""
    decoder = Decoder(model, prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for _ in range(sampling.max_tokens):
        tokens = [0] * len(prompts)  # a finished row continues with zeros, and its logits are ignored
        for row, logits in enumerate(decoder.logits()):
            if not running[row]:
                continue
            tokens[row] = samplers[row](logits)
            running[row] = tokens[row] not in end_ids
            if running[row]:
                answers[row].append(tokens[row])
        if not any(running):
            break
        decoder.append(tokens)
    return answers
