"""Next tokens from a transformers model: its cache and its logits processors, with a random generator of our own."""

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

ROWS = 16  # prompts answered side by side


class Chooser:
    """Chooses the next id of one row. Row `row` of a batch draws the same numbers whoever shares its batch."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, *, row: int):
        self.ids = list(prompt)
        self.greedy = sampling.temperature == 0
        self.processors = processors(sampling)
        seed = int(np.random.SeedSequence([sampling.seed, row]).generate_state(1)[0])
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device

    def __call__(self, logits: torch.Tensor) -> int:
        """(V,) logits -> the id, which is remembered for the repetition penalty."""
        scores = self.processors(torch.tensor([self.ids], device=logits.device), logits[None].float())
        if self.greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self.generator))
        self.ids.append(token)
        return token


def processors(sampling: Sampling) -> LogitsProcessorList:
    """The penalty first, then temperature, top-k, top-p."""
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 0:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(TopPLogitsWarper(sampling.top_p))
    return found


class Decoder:
    """Rows side by side: padded on the left, so that the next id of each follows its last."""

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
        """(B, V) for the next id of every row."""
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.inputs.shape[1] :]
        out = self.model(
            input_ids=self.inputs,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        found: torch.Tensor = out.logits[:, -1]
        return found

    def feed(self, ids: Sequence[int]) -> None:
        """Give every row its next id."""
        self.inputs = torch.tensor(ids, device=self.mask.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.inputs)], dim=-1)


def generate(model: nn.Module, prompt: Sequence[int], sampling: Sampling, end_ids: Sequence[int]) -> Iterator[int]:
    """Yield the ids of one answer, end id left out."""
    decoder, choose = Decoder(model, [prompt]), Chooser(prompt, sampling, row=0)
    for _ in range(sampling.max_tokens):
        token = choose(decoder.logits()[0])
        if token in end_ids:
            return
        yield token
        decoder.feed([token])


def generate_batch(
    model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, end_ids: Sequence[int]
) -> list[list[int]]:
    """Answer every prompt, ROWS at a time, those of like length together."""
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for at in range(0, len(order), ROWS):
        rows = order[at : at + ROWS]
        choosers = [Chooser(prompts[row], sampling, row=row) for row in rows]
        answers.update(
            zip(rows, _answer(model, [prompts[row] for row in rows], choosers, sampling, end_ids), strict=True)
        )
    return [answers[index] for index in range(len(prompts))]


def _answer(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    choosers: Sequence[Chooser],
    sampling: Sampling,
    end_ids: Sequence[int],
) -> list[list[int]]:
    decoder = Decoder(model, prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for _ in range(sampling.max_tokens):
        following = [0] * len(prompts)  # a row that has ended is fed on, and not looked at
        for row, logits in enumerate(decoder.logits()):
            if not running[row]:
                continue
            following[row] = choosers[row](logits)
            running[row] = following[row] not in end_ids
            if running[row]:
                answers[row].append(following[row])
        if not any(running):
            break
        decoder.feed(following)
    return answers
