"""How long training takes at best: float operations and bytes of each part, against what a machine can do of either.

The roofline (Williams et al., doi 10.1145/1498765.1498785): a part takes the longer of operations / rate and bytes / bandwidth. A
product of T positions with a weight of n numbers is 2 T n operations forward and 2 T n backward, since LoRA's base needs no gradient of
its own. Real steps take longer than their roofline, so every time told is an estimate.
"""

from dataclasses import dataclass

from mlx_fish.adapter import LoraSpec, block_of
from mlx_fish.machine import Machine
from mlx_fish.memory import Dimensions, Shape

# Of a step's time on two CPU cores, 60 % went into matrix products (docs/results.md); on Metal this is not measured yet.
SHARE_AT_THE_ROOF = 0.6


@dataclass(frozen=True)
class Work:
    """Float operations, and bytes that come from memory or go there."""

    operations: float
    num_bytes: float


def work_of(
    model: Dimensions, spec: LoraSpec, shape: Shape, *, grad_checkpoint: bool = False, training: bool = True
) -> dict[str, Work]:
    """The work on one micro-batch by part; without `training`, that of a validation."""
    first = min((block_of(module) for module in spec.layers), default=model.num_blocks)
    reached = (model.num_blocks - first) / model.num_blocks if training else 0.0  # the share with a backward pass
    passes = 1 + reached + (reached if grad_checkpoint else 0.0)
    products = 2 * shape.tokens * model.block_parameters
    low_rank = 2 * shape.tokens * spec.num_parameters * (3 if training else 1)
    scores = (
        2 * model.queries * shape.rows * shape.width**2
    )  # the operations of one product with (W, W) for each head and row
    logits = shape.labels * model.vocab
    head_bytes = (model.weight_bytes - model.block_bytes) * (1 + training) + 4 * logits * (4 if training else 2)
    wide = model.float_bytes * shape.tokens * (3 * model.inner + 8 * model.hidden) * model.num_blocks
    return {
        "blocks": Work(products * passes + low_rank, model.block_bytes * passes + 2 * wide * passes),
        "attention": Work(scores * model.num_blocks * (2 + 5 * reached), 0.0),
        "head": Work(2 * logits * model.hidden * (1 + training), head_bytes),
        "optimizer": Work(0.0, 4 * spec.num_parameters * 12 * training),
    }


def seconds_of(work: dict[str, Work], machine: Machine) -> float | None:
    """An estimate; None where the machine's speed is not known."""
    if machine.flops is None or machine.bandwidth is None:
        return None
    roof = sum(max(part.operations / machine.flops, part.num_bytes / machine.bandwidth) for part in work.values())
    return roof / SHARE_AT_THE_ROOF
