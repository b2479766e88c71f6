"""Predict the peak memory of training, part by part, from shapes alone. Arithmetic only, no framework.

A LoRA update over frozen weights computes T positions, which attention sees as a grid of R rows and W columns. With
N label slots, hidden size D, MLP size I, H query heads, K the total size of the key-value heads, and r the ranks of a
block's adapted layers, the update holds:

always
    the weights, in the dtype that they are computed with
    for each of the P trainable parameters: a float32 master copy and AdamW's two moments
until a block's backward pass, for each block from the first adapted one on (saved for its vjp)
  floats per computed position:
    2 D       the block's input and the residual stream after attention, for RMSNorm's backward
    D, D      the two normed inputs, if q, k or v, or if gate or up is adapted: the gradient of A is x^T (dy B)
    D         attention's output
    2 I       gate and up (SwiGLU's backward recomputes the sigmoid); if down is adapted, I more for their product
    sum r     A x of each adapted layer, for the gradient of B
  floats per grid position:
    D+2K+H    attention's rotated queries, its keys and values, and the log-sum-exp;
              the probabilities are recomputed, one block of queries at a time
  With --grad-checkpoint a block keeps only its input, and one block at a time holds all of the above.
at the largest of three phases
    loss      at the end of the forward pass: the logits of one chunk of the vocabulary, the arrays computed from
              them, and a few (N, D) arrays
    backward  of the first adapted block: gradients of (T, I) and (T, D) arrays and of one block of attention scores.
              Several are in flight at a time, because a framework starts the next operations before it frees the
              buffers of the last ones.
    optimizer the gradient as one vector, and the new masters and moments alongside the old ones

The number of arrays in flight depends on the framework's order of evaluation, so it is measured: see CONSTANTS.
"""

import math
from dataclasses import dataclass, fields

from mlx_fish.adapters.spec import AdapterSpec, block_of
from mlx_fish.backends.limits import MLX_LOSS_CHUNK_BYTES, MLX_LOSS_MAX_CHUNK, MLX_LOSS_MIN_CHUNK, MLX_QUERY_BLOCK
from mlx_fish.data.order import MicroBatch
from mlx_fish.models.folder import ModelFolder

# (N, D) float32 arrays in the loss: the gathered hidden states, the running sum of head rows, the target rows, and
# the difference of the last two.
LOSS_HIDDEN_ARRAYS = 4
_HALF_DTYPES = ("BF16", "F16")


@dataclass(frozen=True)
class Constants:
    """Numbers of arrays in flight at the peak, each in units of the array shape given."""

    wide: float  # (T, I), in a block's backward pass
    narrow: float  # (T, D), in a block's backward pass
    scores: float  # (R, H, MLX_QUERY_BLOCK, W), in a block's backward pass
    wide_recomputed: float  # like `wide`, in the backward pass of a checkpointed block
    inputs: float  # (T, D) per checkpointed block, held until the end of the backward pass
    chunks: float  # (N, chunk) float32, in the loss over a vocabulary of many chunks
    spread: float  # with few chunks, the loss holds only chunks * tanh(number of chunks / spread)
    optimizer: float  # (P,), in addition to masters and moments
    dropout: float  # a layer's input, saved for its dropout mask
    forward: float  # (T, I), in a block of a validation batch
    forward_chunks: float  # like `chunks`, in the loss of a validation batch


# Fitted by `python tools/fit_plan.py --fit` to MLX 0.32.4 on a CPU, float32, 24 November 2026.
# The largest error over its 43 settings was 2.2 % of the peak (6.2 % of the memory above the weights).
CONSTANTS = Constants(
    wide=5.9,
    narrow=16.9,
    scores=1.39,
    wide_recomputed=12.2,
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
    """The sizes of a micro-batch that determine its memory and time.

    Attributes:
        tokens: positions computed, padding included (T).
        rows, width: attention's grid (R, W).
        labels: label slots (N).
    """

    tokens: int
    rows: int
    width: int
    labels: int


def shape_of(micro: MicroBatch, *, packing: bool) -> Shape:
    """Return the shape of a micro-batch before its arrays are built."""
    capacity = micro.capacity
    return Shape(micro.num_computed(packing=packing), len(micro.rows), capacity.width, capacity.labels)


@dataclass(frozen=True)
class Dimensions:
    """The dimensions of a base model that determine memory and time.

    Attributes:
        hidden, inner: hidden size (D) and MLP size (I).
        heads: number of query heads (H).
        queries, keys: total size of all query heads, and of all key-value heads (K).
        weight_bytes, block_bytes: bytes of all weights, and of the blocks' weights, in the dtypes that they
            are computed with.
        block_parameters: parameters of all blocks' linear layers, counted before quantisation.
        block_widths: sum of the input and output sizes of these layers.
        tied: whether the head shares the embedding matrix.
        float_bytes: bytes of one activation value.
        on_gpu: whether the model runs on a GPU, where the loss uses larger chunks of the vocabulary.
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
        """Read the dimensions of a model folder.

        Args:
            float_bytes: 4: half precision is widened to float32; None: activations and weights keep their
                stored dtype.
        """
        config = folder.config
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head_width = int(config.get("head_dim") or hidden // heads)
        tied = bool(config.get("tie_word_embeddings"))
        sizes = {
            name: (info.end - info.start) * (2 if info.dtype in _HALF_DTYPES and float_bytes == 4 else 1)
            for name, info in folder.weights.items()
            if not (tied and name.startswith("lm_head."))  # the embedding serves as the head
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
            float_bytes=float_bytes or (2 if folder.weights["model.norm.weight"].dtype in _HALF_DTYPES else 4),
            on_gpu=on_gpu,
        )

    @property
    def four_bit_bytes(self) -> int:
        """Bytes of the weights with matrices quantised to 4 bits, in groups of 64 with a scale and a bias each."""
        matrices = self.block_parameters + self.vocab * self.hidden * (1 if self.tied else 2)
        return int(matrices * (0.5 + 2 * self.float_bytes / 64))


@dataclass(frozen=True)
class Peak:
    """Peak memory in bytes, by part."""

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
    """Return the peak memory of an update over one micro-batch of this shape.

    `feature_bytes` is the size of one feature of all T computed positions, so a (T, D) array takes D times as
    much.
    """
    blocks = range(min(map(block_of, spec.layers)), model.num_blocks)  # blocks with a backward pass
    feature_bytes, score_bytes = model.float_bytes * shape.tokens, _score_bytes(model, shape)
    grid_bytes = model.float_bytes * shape.rows * shape.width * (model.queries + 2 * model.keys + model.heads)
    saved_per_block = [feature_bytes * _saved_floats(model, spec, block, constants) + grid_bytes for block in blocks]
    hidden_bytes, state_bytes = feature_bytes * model.hidden, 12 * spec.num_parameters
    saved_bytes: float
    if grad_checkpoint:
        saved_bytes = hidden_bytes * len(blocks)
        backward_bytes = hidden_bytes * constants.inputs * len(blocks) + max(saved_per_block)
        backward_bytes += feature_bytes * constants.wide_recomputed * model.inner
    else:
        saved_bytes = math.fsum(saved_per_block)
        backward_bytes = saved_bytes + feature_bytes * constants.wide * model.inner + constants.narrow * hidden_bytes
    phases = (
        Peak(
            model.weight_bytes,
            state_bytes,
            int(saved_bytes),
            0,
            _loss_bytes(model, shape, constants.chunks, constants.spread),
        ),
        Peak(model.weight_bytes, state_bytes, int(backward_bytes), int(constants.scores * score_bytes), 0),
        Peak(model.weight_bytes, int(state_bytes + 4 * constants.optimizer * spec.num_parameters), 0, 0, 0),
    )
    return max(phases, key=lambda peak: peak.total)


def forward_peak_of(model: Dimensions, spec: AdapterSpec, shape: Shape, *, constants: Constants = CONSTANTS) -> Peak:
    """Return the peak memory of a validation batch.

    It holds one block's arrays at a time, then those of the loss without its gradient.
    """
    feature_bytes, state_bytes = model.float_bytes * shape.tokens, 12 * spec.num_parameters
    loss = _loss_bytes(model, shape, constants.forward_chunks, constants.spread)
    activation_bytes = feature_bytes * constants.forward * model.inner
    score_bytes = constants.scores * _score_bytes(model, shape)
    phases = (
        Peak(model.weight_bytes, state_bytes, feature_bytes * model.hidden, 0, loss),
        Peak(model.weight_bytes, state_bytes, int(activation_bytes), int(score_bytes), 0),
    )
    return max(phases, key=lambda peak: peak.total)


def _score_bytes(model: Dimensions, shape: Shape) -> int:
    """Return the bytes of attention scores for one block of queries, (R, H, block, W)."""
    block = min(MLX_QUERY_BLOCK, shape.width)
    return model.float_bytes * model.heads * shape.rows * block * shape.width


def _saved_floats(model: Dimensions, spec: AdapterSpec, block: int, constants: Constants) -> float:
    """Return the floats per computed position that one block saves for its backward pass."""
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
    """Return the bytes that the loss holds while it goes through the vocabulary in chunks."""
    budget = MLX_LOSS_CHUNK_BYTES["gpu" if model.on_gpu else "cpu"]
    chunk = min(MLX_LOSS_MAX_CHUNK, max(MLX_LOSS_MIN_CHUNK, budget // (4 * shape.labels)))
    in_flight = chunks * math.tanh(model.vocab / chunk / spread)
    return int(4 * shape.labels * (in_flight * min(chunk, model.vocab) + LOSS_HIDDEN_ARRAYS * model.hidden))
