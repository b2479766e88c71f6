"""The models and settings that `fit_plan.py` measures."""

import dataclasses
from typing import Any

import numpy as np

from mlx_fish.adapters.spec import AdapterSpec, choose_layers
from mlx_fish.data.batches import Batch, Capacity, make_batch
from mlx_fish.data.order import MicroBatch
from mlx_fish.data.tokens import Tokens
from mlx_fish.models.folder import ModelFolder

# name -> config: the two architectures, small vocabularies (where a block decides) and Qwen2's own (where the loss does).
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden": 256, "inner": 1408, "heads": 4, "kv_heads": 2, "blocks": 8, "vocab": 151_936},
    "qwen2-narrow": {"hidden": 448, "inner": 704, "heads": 7, "kv_heads": 1, "blocks": 6, "vocab": 320},
    "qwen2-wide": {"hidden": 256, "inner": 2816, "heads": 4, "kv_heads": 2, "blocks": 12, "vocab": 320},
    "llama": {"type": "llama", "hidden": 384, "inner": 1024, "heads": 6, "kv_heads": 6, "blocks": 8, "vocab": 32_000},
    # of HELD_OUT alone
    "qwen2-other": {"hidden": 512, "inner": 1536, "heads": 8, "kv_heads": 4, "blocks": 10, "vocab": 60_000},
    "llama-other": {
        "type": "llama",
        "hidden": 256,
        "inner": 768,
        "heads": 8,
        "kv_heads": 2,
        "blocks": 14,
        "vocab": 8_000,
    },
}
QUANTIZED = "-4bit"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One measurement: a model and what is trained on it, or validated.

    Attributes:
        labels: the share of each row that is supervised.
        shortest: the shortest row's length as a share of `length`, the longest one's.
    """

    model: str
    batch_size: int
    length: int
    labels: float = 0.5
    rank: int = 8
    target: str = "all"
    num_layers: int | None = None
    grad_checkpoint: bool = False
    dropout: float = 0.0
    training: bool = True
    packing: bool = False
    shortest: float = 1.0

    def micro_batch(self, vocab: int) -> MicroBatch:
        rng = np.random.default_rng(0)
        rows = []
        for number, share in enumerate(np.linspace(1, self.shortest, self.batch_size)):
            length = int(share * self.length)
            supervised = np.arange(length + 1) > length * (1 - self.labels)
            ids = rng.integers(0, vocab, length + 1).astype(np.int32)
            rows.append(Tokens(ids, supervised, f"row:{number}", cut=False))
        return MicroBatch(rows, Capacity.of([rows]))

    def batch(self, vocab: int) -> Batch:
        """The same rows, laid out."""
        micro = self.micro_batch(vocab)
        return make_batch(micro.rows, packing=self.packing, capacity=micro.capacity)

    def spec(self, folder: ModelFolder) -> AdapterSpec:
        layers = choose_layers(folder.linear_layers, target=self.target, num_layers=self.num_layers)
        return AdapterSpec.uniform(layers, rank=self.rank, alpha=2 * self.rank, dropout=self.dropout)


SETTINGS = [
    Setting("qwen2", 4, 144),
    Setting("qwen2", 1, 64),
    Setting("qwen2", 8, 256),
    Setting("qwen2", 1, 1024, labels=0.25),
    Setting("qwen2", 4, 144, rank=64),
    Setting("qwen2", 4, 144, grad_checkpoint=True),
    Setting("qwen2", 8, 256, grad_checkpoint=True),
    Setting("qwen2", 2, 512, labels=0.9, rank=16),
    Setting("qwen2" + QUANTIZED, 4, 144),
    Setting("qwen2" + QUANTIZED, 2, 384, rank=32),
    Setting("qwen2" + QUANTIZED, 4, 144, grad_checkpoint=True),
    Setting("qwen2-narrow", 4, 144),
    Setting("qwen2-narrow", 1, 768),
    Setting("qwen2-narrow", 8, 96, rank=64),
    Setting("qwen2-narrow", 4, 256, grad_checkpoint=True),
    Setting("qwen2-wide", 4, 144),
    Setting("qwen2-wide", 2, 512),
    Setting("qwen2-wide", 4, 144, rank=128),
    Setting("qwen2-wide", 4, 144, num_layers=6),
    Setting("qwen2-wide", 4, 144, target="q_proj,k_proj,v_proj,o_proj"),
    Setting("qwen2-wide", 4, 144, dropout=0.1),
    Setting("qwen2-wide", 4, 144, grad_checkpoint=True),
    Setting("qwen2-wide", 2, 512, grad_checkpoint=True),
    Setting("llama", 4, 144),
    Setting("llama", 2, 512),
    Setting("llama", 16, 64, rank=1),
    Setting("llama", 4, 144, rank=64),
    Setting("llama", 4, 144, grad_checkpoint=True),
    Setting("llama", 1, 768, grad_checkpoint=True),
    Setting("llama", 4, 144, target="q_proj,v_proj"),
    Setting("llama", 4, 256, dropout=0.1),
    Setting("qwen2", 4, 200, packing=True, shortest=0.6),
    Setting("qwen2", 8, 320, packing=True, shortest=0.4, grad_checkpoint=True),
    Setting("qwen2" + QUANTIZED, 4, 200, packing=True, shortest=0.6),
    Setting("qwen2-narrow", 4, 400, packing=True, shortest=0.5),
    Setting("qwen2-wide", 4, 200, packing=True, shortest=0.7),
    Setting("qwen2-wide", 4, 320, packing=True, shortest=0.5, grad_checkpoint=True),
    Setting("llama", 4, 200, packing=True, shortest=0.6),
    Setting("llama", 8, 160, packing=True, shortest=0.9, rank=32),
    Setting("llama", 4, 256, packing=True, shortest=0.6, training=False),
    Setting("qwen2", 2, 512, training=False),
    Setting("qwen2-wide", 2, 512, training=False),
    Setting("llama", 4, 144, training=False),
]

# Never fitted to: what a person's own model and settings can expect.
HELD_OUT = [
    Setting("qwen2-other", 4, 160),
    Setting("qwen2-other", 2, 640, labels=0.7),
    Setting("qwen2-other", 6, 240, packing=True, shortest=0.5),
    Setting("qwen2-other", 4, 288, packing=True, shortest=0.8, grad_checkpoint=True),
    Setting("qwen2-other", 3, 112, rank=96),
    Setting("qwen2-other", 4, 192, num_layers=4),
    Setting("qwen2-other" + QUANTIZED, 4, 224, packing=True, shortest=0.6),
    Setting("qwen2-other" + QUANTIZED, 8, 128, grad_checkpoint=True),
    Setting("qwen2-other", 4, 240, packing=True, shortest=0.4, training=False),
    Setting("llama-other", 4, 160),
    Setting("llama-other", 1, 1536, labels=0.3),
    Setting("llama-other", 12, 96, packing=True, shortest=0.7),
    Setting("llama-other", 4, 320, packing=True, shortest=0.5, rank=24),
    Setting("llama-other", 2, 448, grad_checkpoint=True),
    Setting("llama-other", 4, 200, target="q_proj,v_proj"),
    Setting("llama-other", 6, 200, dropout=0.05),
]
