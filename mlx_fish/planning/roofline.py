"""How long training takes at best: float operations and bytes of each part, against what a machine can do of either.

The roofline (Williams et al., doi 10.1145/1498765.1498785): a part takes the longer of operations / rate and bytes / bandwidth. A
product of T positions with a weight of n numbers is 2 T n operations forward and 2 T n backward, since LoRA's base needs no gradient of
its own. Real steps take longer than their roofline, so every time told is an estimate.
"""

from dataclasses import dataclass

from mlx_fish.adapters.spec import AdapterSpec, block_of
from mlx_fish.planning.machine import Machine
from mlx_fish.planning.memory import Dimensions, Shape

# Of a step's time on two CPU cores, 60 % went into matrix products (docs/results.md); on Metal this is not measured yet.
SHARE_AT_THE_ROOF = 0.6


@dataclass(frozen=True)
class Work:
    """Float operations, and bytes that come from memory or go there."""

    operations: float
    num_bytes: float


def work_of(
    model: Dimensions, spec: AdapterSpec, shape: Shape, *, grad_checkpoint: bool = False, training: bool = True
) -> dict[str, Work]:
    """The work on one micro-batch by part; without `training`, that of a validation."""
    first = min((block_of(module) for module in spec.layers), default=model.num_blocks)
    backward = (model.num_blocks - first) / model.num_blocks if training else 0.0  # the share of blocks that have one
    forward = 1 + (backward if grad_checkpoint else 0.0)
    passes, position = forward + backward, model.float_bytes * shape.tokens
    # Of one product of queries with keys: under the causal mask half of them meet.
    scores = model.queries * shape.rows * shape.width**2 * model.num_blocks
    narrow = sum(sum(layer.shape) + layer.rank for layer in spec.layers.values())
    # Norms, residual sums, rotary positions and SwiGLU, each read and written once a pass.
    elements = model.num_blocks * (13 * model.hidden + 2 * model.keys + 4 * model.inner) * shape.tokens
    return {
        "blocks": Work(
            2 * shape.tokens * model.block_parameters * passes,
            model.block_bytes * passes + position * model.block_widths * passes,
        ),
        "head": Work(
            2 * shape.labels * model.vocab * model.hidden * (1 + training),
            (model.weight_bytes - model.block_bytes) * (1 + training),
        ),
        "attention": Work(
            scores * (2 * forward + 4 * backward),
            8 * position * (model.queries + model.keys) * model.num_blocks * passes,
        ),
        "lora": Work(
            2 * shape.tokens * spec.num_parameters * (1 + 2 * training), position * narrow * (1 + 2 * training)
        ),
        "elementwise": Work(4 * elements * passes, model.float_bytes * elements * passes),
        "optimizer": Work(16 * spec.num_parameters * training, 32 * spec.num_parameters * training),
    }


def seconds_of(work: dict[str, Work], machine: Machine) -> float | None:
    """An estimate; None where the machine's speed is not known."""
    if machine.flops is None or machine.bandwidth is None:
        return None
    roof = sum(max(part.operations / machine.flops, part.num_bytes / machine.bandwidth) for part in work.values())
    return roof / SHARE_AT_THE_ROOF
