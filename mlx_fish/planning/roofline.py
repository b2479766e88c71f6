"""Estimate training time with a roofline model, from the operations and bytes of each part.

The roofline (Williams et al., doi 10.1145/1498765.1498785): a part takes the longer of operations /
throughput and bytes / bandwidth. Multiplying T positions by a weight of n parameters takes 2 T n operations
forward and 2 T n backward: LoRA's frozen base needs the gradient of its input, but none of its weight. Real
steps are slower than their roofline, so every time is an estimate.
"""

from dataclasses import dataclass

from mlx_fish.adapters.spec import AdapterSpec, block_of
from mlx_fish.planning.machine import Machine
from mlx_fish.planning.memory import Dimensions, Shape

# On two CPU cores, 60 % of a step's time went into matrix products (docs/results.md); not measured on Metal yet.
ROOFLINE_EFFICIENCY = 0.6


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read from and written to memory."""

    operations: float
    num_bytes: float


def work_of(
    model: Dimensions, spec: AdapterSpec, shape: Shape, *, grad_checkpoint: bool = False, training: bool = True
) -> dict[str, Work]:
    """Return the work on one micro-batch, by part of the model.

    Args:
        grad_checkpoint: the blocks that have a backward pass run their forward pass twice.
        training: False for a validation batch, which has no backward pass and no optimizer step.
    """
    first_block = min((block_of(module) for module in spec.layers), default=model.num_blocks)
    backward = (
        (model.num_blocks - first_block) / model.num_blocks if training else 0.0
    )  # share of blocks with a backward pass
    forward = 1 + (backward if grad_checkpoint else 0.0)
    passes, feature_bytes = forward + backward, model.float_bytes * shape.tokens
    # Operations of one product of queries and keys, halved by the causal mask.
    score_operations = model.queries * shape.rows * shape.width**2 * model.num_blocks
    lora_widths = sum(sum(layer.shape) + layer.rank for layer in spec.layers.values())
    # Norms, residual sums, rotary embeddings and SwiGLU, each read and written once per pass.
    elements = model.num_blocks * (13 * model.hidden + 2 * model.keys + 4 * model.inner) * shape.tokens
    return {
        "blocks": Work(
            2 * shape.tokens * model.block_parameters * passes,
            model.block_bytes * passes + feature_bytes * model.block_widths * passes,
        ),
        "head": Work(
            2 * shape.labels * model.vocab * model.hidden * (1 + training),
            (model.weight_bytes - model.block_bytes) * (1 + training),
        ),
        "attention": Work(
            score_operations * (2 * forward + 4 * backward),
            8 * feature_bytes * (model.queries + model.keys) * model.num_blocks * passes,
        ),
        "lora": Work(
            2 * shape.tokens * spec.num_parameters * (1 + 2 * training),
            feature_bytes * lora_widths * (1 + 2 * training),
        ),
        "elementwise": Work(4 * elements * passes, model.float_bytes * elements * passes),
        "optimizer": Work(16 * spec.num_parameters * training, 32 * spec.num_parameters * training),
    }


def seconds_of(work: dict[str, Work], machine: Machine) -> float | None:
    """Estimate the time of this work in seconds; None if the machine's speed is unknown."""
    if machine.flops is None or machine.bandwidth is None:
        return None
    bound = sum(max(part.operations / machine.flops, part.num_bytes / machine.bandwidth) for part in work.values())
    return bound / ROOFLINE_EFFICIENCY
