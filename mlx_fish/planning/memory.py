"""What training holds at its peak, part by part, from shapes alone: NumPy and arithmetic, no framework.

An update of LoRA over frozen weights holds, for T positions that are computed (G = R W of them in the grid of rows that attention sees),
N label slots, width D, inner width I, H query heads, and r the ranks of a block's adapted layers:

always        the weights as they are computed with, and for each of P trainable numbers a master and AdamW's two moments
until a block's backward, for each block from the first adapted one on (what its vjp needs, floats a position)
    2 D       the block's input and the middle of its residual stream: RMSNorm's backward
    D, D      the two normed inputs, where q, k or v, and gate or up, are adapted: a gradient of A is x^T (dy B)
    D         attention's output
    2 I       gate and up (SwiGLU's backward recomputes the sigmoid), and I more, their product, where down is adapted
    sum r     A x of each adapted layer, for B's gradient
and a position of the grid: D + 2 K + H, attention's rotated queries, keys, values (K: all key-value heads) and log-sum-exp;
    its probabilities are computed again, a block of queries at a time
    with --grad-checkpoint a block keeps its input alone, and one block at a time all of the above
and the largest of what three moments add:
    the loss ends the forward: logits of a chunk of the vocabulary and what is computed from them, some (N, D) arrays
    the first block's backward: gradients of wide and narrow arrays and of a block of attention's scores, several in flight at a time,
        since a framework starts the next operations before the last ones' buffers are free
    the optimizer: the gradient as one vector, the new masters and moments beside the old

How many arrays are in flight depends on the framework's order of evaluation, so those numbers are measured: see CONSTANTS.
"""

import math
from dataclasses import dataclass, fields

from mlx_fish.adapters.spec import AdapterSpec, block_of
from mlx_fish.backends.limits import MLX_LOSS_CHUNK_BYTES, MLX_LOSS_MAX_CHUNK, MLX_LOSS_MIN_CHUNK, MLX_QUERY_BLOCK
from mlx_fish.data.order import MicroBatch
from mlx_fish.models.folder import ModelFolder

LOSS_HIDDEN = 4  # (N, D) float32 arrays: the running sum of rows, the targets' rows, their difference, what is gathered
_HALF = ("BF16", "F16")


@dataclass(frozen=True)
class Constants:
    """Arrays in flight at the peak, counted in arrays of the width named."""

    wide: float  # (T, I), in a block's backward
    narrow: float  # (T, D), in a block's backward
    scores: float  # H R W MLX_QUERY_BLOCK, in a block's backward
    wide_again: float  # as `wide`, where the block is computed again
    inputs: float  # (T, D) that a checkpointed block keeps until the backward is through
    chunks: float  # (N, chunk) float32 in the loss, when the vocabulary has many chunks
    spread: float  # and over how many chunks they are spread: fewer chunks hold chunks * tanh(number / spread)
    optimizer: float  # (P,) beside masters and moments
    dropout: float  # a layer's input, kept for its mask
    forward: float  # (T, I), in a validation's block
    forward_chunks: float  # as `chunks`, in a validation's loss


# Fitted by `python scripts/fit_plan.py --fit` to MLX 0.32.4 on a CPU, float32, 24 November 2026.
# The largest error over its 43 settings was 2.2 % of the peak (6.2 % of what is above the weights).
CONSTANTS = Constants(
    wide=5.9,
    narrow=16.9,
    scores=1.39,
    wide_again=12.2,
    inputs=2.82,
    chunks=9.3,
    spread=3.63,
    optimizer=9,
    dropout=1.35,
    forward=4.09,
    forward_chunks=10.4,
)


@dataclass(frozen=True)
class Shape:
    """What a micro-batch costs by: positions computed, attention's grid of rows x width, label slots."""

    tokens: int
    rows: int
    width: int
    labels: int


def shape_of(micro: MicroBatch, *, packing: bool) -> Shape:
    """The shape of a micro-batch that is still to be laid out."""
    capacity = micro.capacity
    return Shape(micro.num_computed(packing=packing), len(micro.rows), capacity.width, capacity.labels)


@dataclass(frozen=True)
class Dimensions:
    """A base model as its memory and time depend on it.

    Attributes:
        weight_bytes, block_bytes: all weights, and those of the blocks, in the types that they are computed with.
        block_parameters: weights of all blocks' linear layers, counted before quantisation.
        block_widths: the inputs and outputs of these layers, added up.
        tied: the head is the embedding.
        float_bytes: of one activation.
        on_gpu: the loss takes larger chunks of the vocabulary.
    """

    hidden: int
    inner: int
    heads: int
    queries: int
    keys: int
    vocab: int
    num_blocks: int
    weight_bytes: int
    block_bytes: int
    block_parameters: int
    block_widths: int
    tied: bool
    float_bytes: int
    on_gpu: bool

    @classmethod
    def of(cls, folder: ModelFolder, *, float_bytes: int | None = None, on_gpu: bool = False) -> "Dimensions":
        """
        Args:
            float_bytes: None: activations and weights stay in the type that is stored; 4: half precision is widened.
        """
        config = folder.config
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head_width = int(config.get("head_dim") or hidden // heads)
        tied = bool(config.get("tie_word_embeddings"))
        sizes = {
            name: (info.end - info.start) * (2 if info.dtype in _HALF and float_bytes == 4 else 1)
            for name, info in folder.weights.items()
            if not (tied and name.startswith("lm_head."))  # the embedding is used twice
        }
        return cls(
            hidden=hidden,
            inner=int(config["intermediate_size"]),
            heads=heads,
            queries=heads * head_width,
            keys=int(config.get("num_key_value_heads") or heads) * head_width,
            vocab=int(config["vocab_size"]),
            num_blocks=1 + max(block_of(module) for module in folder.linear_layers),
            weight_bytes=sum(sizes.values()),
            block_bytes=sum(size for name, size in sizes.items() if ".layers." in name),
            block_parameters=sum(out * into for out, into in folder.linear_layers.values()),
            block_widths=sum(out + into for out, into in folder.linear_layers.values()),
            tied=tied,
            float_bytes=float_bytes or (2 if folder.weights["model.norm.weight"].dtype in _HALF else 4),
            on_gpu=on_gpu,
        )

    @property
    def four_bit_bytes(self) -> int:
        """Of the weights if matrices had 4 bits a number, and each group of 64 a scale and a bias."""
        matrices = self.block_parameters + self.vocab * self.hidden * (1 if self.tied else 2)
        return int(matrices * (0.5 + 2 * self.float_bytes / 64))


@dataclass(frozen=True)
class Peak:
    """Bytes held when most is held, by what they are for."""

    weights: int
    adapter: int
    activations: int
    attention: int
    loss: int
    framework: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


def peak_of(
    model: Dimensions, spec: AdapterSpec, shape: Shape, *, grad_checkpoint: bool, constants: Constants = CONSTANTS
) -> Peak:
    """The most that an update over one micro-batch of this shape holds."""
    blocks = range(min(map(block_of, spec.layers)), model.num_blocks)  # those that the backward pass goes through
    position, scores = model.float_bytes * shape.tokens, _scores_bytes(model, shape)
    grid = model.float_bytes * shape.rows * shape.width * (model.queries + 2 * model.keys + model.heads)
    whole = [position * _kept_floats(model, spec, block, constants) + grid for block in blocks]
    narrow, state = position * model.hidden, 12 * spec.num_parameters
    kept: float
    if grad_checkpoint:
        kept = narrow * len(blocks)
        backward = narrow * constants.inputs * len(blocks) + max(whole)
        backward += position * constants.wide_again * model.inner
    else:
        kept = math.fsum(whole)
        backward = kept + position * constants.wide * model.inner + constants.narrow * narrow
    moments = (
        Peak(
            model.weight_bytes,
            state,
            int(kept),
            0,
            _loss_bytes(model, shape, constants.chunks, constants.spread),
        ),
        Peak(model.weight_bytes, state, int(backward), int(constants.scores * scores), 0),
        Peak(model.weight_bytes, int(state + 4 * constants.optimizer * spec.num_parameters), 0, 0, 0),
    )
    return max(moments, key=lambda peak: peak.total)


def forward_peak_of(model: Dimensions, spec: AdapterSpec, shape: Shape, *, constants: Constants = CONSTANTS) -> Peak:
    """The most that a validation batch holds: one block's arrays at a time, then the loss without its gradient."""
    position, state = model.float_bytes * shape.tokens, 12 * spec.num_parameters
    loss = _loss_bytes(model, shape, constants.forward_chunks, constants.spread)
    block, scores = position * constants.forward * model.inner, constants.scores * _scores_bytes(model, shape)
    moments = (
        Peak(model.weight_bytes, state, position * model.hidden, 0, loss),
        Peak(model.weight_bytes, state, int(block), int(scores), 0),
    )
    return max(moments, key=lambda peak: peak.total)


def _scores_bytes(model: Dimensions, shape: Shape) -> int:
    """Of one block of queries."""
    block = min(MLX_QUERY_BLOCK, shape.width)
    return model.float_bytes * model.heads * shape.rows * block * shape.width


def _kept_floats(model: Dimensions, spec: AdapterSpec, block: int, constants: Constants) -> float:
    """What one block keeps a position for its backward."""
    layers = {module: layer for module, layer in spec.layers.items() if block_of(module) == block}
    adapted = {module.rsplit(".", 1)[-1] for module in layers}
    floats = 2 * model.hidden + model.queries + 2 * model.inner
    floats += model.hidden * (bool(adapted & {"q_proj", "k_proj", "v_proj"}) + bool(adapted & {"gate_proj", "up_proj"}))
    floats += model.inner * ("down_proj" in adapted)
    floats += sum(layer.rank for layer in layers.values())
    if not spec.dropout:
        return floats
    return floats + constants.dropout * sum(layer.shape[1] for layer in layers.values())


def _loss_bytes(model: Dimensions, shape: Shape, chunks: float, spread: float) -> int:
    budget = MLX_LOSS_CHUNK_BYTES["gpu" if model.on_gpu else "cpu"]
    chunk = min(MLX_LOSS_MAX_CHUNK, max(MLX_LOSS_MIN_CHUNK, budget // (4 * shape.labels)))
    in_flight = chunks * math.tanh(model.vocab / chunk / spread)
    return int(4 * shape.labels * (in_flight * min(chunk, model.vocab) + LOSS_HIDDEN * model.hidden))
