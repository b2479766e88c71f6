"""Causal self-attention for training, over padded rows or packed rows.

The linear layers compute a packed batch as one sequence (1, T, D), without padding. Only attention uses the grid
(R, W) of its rows, so that a token attends only to its own row and rotary positions start at 0 in each row:

    packed (1, T, D)   a a a b b c c c c          grid (R, W, D)   a a a .
                                                                   b b . .
                                                                   c c c c
"""

from dataclasses import dataclass
from typing import Any, cast

import mlx_fish.backends.mlx.runtime as runtime  # isort: skip
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from mlx_fish.backends.limits import MLX_QUERY_BLOCK
from mlx_fish.backends.mlx.activations import exp


@dataclass(frozen=True)
class PackedRows:
    """Index maps between a packed sequence and the grid of its rows. Passed to the blocks in place of a mask.

    Attributes:
        grid: (R, W) int32, the position in the packed sequence of each token of each row, -1 after the end of a row.
        slots: (T,) int32, the index in the flattened grid of each position of the packed sequence, -1 for padding.
    """

    grid: mx.array
    slots: mx.array


class Attention(nn.Module):
    """The attention of a qwen2 or llama block, with the projections of the mlx-lm module that it replaces."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            attention[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.rope, self.scale = attention.rope, attention.scale
        self.num_heads, self.num_kv_heads = attention.n_heads, attention.n_kv_heads

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """(B, L, D) -> (B, L, D); with PackedRows as `mask`, (1, T, D) -> (1, T, D)."""
        batch, length = x.shape[:2]
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if isinstance(mask, PackedRows):
            rows, width = mask.grid.shape
            queries, keys, values = (_to_grid(packed[0], mask.grid, mask.slots) for packed in (queries, keys, values))
        else:
            rows, width = batch, length
        queries = queries.reshape(rows, width, self.num_heads, -1).transpose(0, 2, 1, 3)
        keys = keys.reshape(rows, width, self.num_kv_heads, -1).transpose(0, 2, 1, 3)
        values = values.reshape(rows, width, self.num_kv_heads, -1).transpose(0, 2, 1, 3)
        if cache is not None:
            queries, keys = (self.rope(queries, offset=cache.offset), self.rope(keys, offset=cache.offset))
            keys, values = cache.update_and_fetch(keys, values)
            out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        elif isinstance(mask, PackedRows) or mask == "causal":
            packed_rows = mask if isinstance(mask, PackedRows) else None
            heads = causal_attention(self.rope(queries) * self.scale, self.rope(keys), values, packed_rows)
            return cast(mx.array, self.o_proj(heads.reshape(batch, length, -1)))
        else:
            queries, keys = self.rope(queries), self.rope(keys)
            out = scaled_dot_product_attention(queries, keys, values, cache=None, scale=self.scale, mask=mask)
        return cast(mx.array, self.o_proj(_flatten(out).reshape(batch, length, -1)))


def _take(rows: mx.array, indices: mx.array) -> mx.array:
    """Return rows[indices], with zeros where an index is negative: (M, C), (N,) -> (N, C)."""
    return rows[mx.maximum(indices, 0)] * (indices >= 0).astype(rows.dtype)[:, None]


@mx.custom_function
def _to_grid(flat: mx.array, grid: mx.array, slots: mx.array) -> mx.array:
    """Gather packed positions into the grid: (T, C) -> (R W, C).

    The gradient is the gather of `_from_grid`; MLX's own gradient would be a scatter.
    """
    return _take(flat, grid.reshape(-1))


@_to_grid.vjp
def _to_grid_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    _, grid, slots = primals
    return _take(cotangent, slots), mx.zeros_like(grid), mx.zeros_like(slots)


@mx.custom_function
def _from_grid(gridded: mx.array, grid: mx.array, slots: mx.array) -> mx.array:
    """Gather the grid back into packed positions: (R W, C) -> (T, C)."""
    return _take(gridded, slots)


@_from_grid.vjp
def _from_grid_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    _, grid, slots = primals
    return _take(cotangent, grid.reshape(-1)), mx.zeros_like(grid), mx.zeros_like(slots)


def causal_attention(queries: mx.array, keys: mx.array, values: mx.array, packed: PackedRows | None = None) -> mx.array:
    """Return softmax(Q K^T + causal mask) V. The queries must be scaled.

    Args:
        queries: (R, H, W, d).
        keys, values: (R, K, W, d); H is a multiple of K (grouped-query attention, arXiv 2305.13245).
        packed: the index maps of packed rows; None for padded rows.

    Returns:
        (T, H d) for packed rows, (R W, H d) for padded rows.
    """
    layout = () if packed is None else (packed.grid, packed.slots)
    if not runtime.on_gpu:
        return cast(tuple[mx.array, mx.array], _blockwise(queries, keys, values, *layout))[0]
    if runtime.on_metal:
        return cast(mx.array, _fused_forward(queries, keys, values, *layout))
    out = _flatten(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask="causal"))
    return cast(mx.array, _from_grid(out, *layout)) if layout else out


@mx.custom_function
def _fused_forward(queries: mx.array, keys: mx.array, values: mx.array, *layout: mx.array) -> mx.array:
    """Compute attention with MLX's fused kernel and a custom backward pass.

    For Metal, whose fused kernel has no backward pass: differentiated by MLX, it would fall back to plain matrix
    products and keep all probabilities (R, H, W, W) of every layer.
    """
    out = _flatten(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask="causal"))
    return _take(out, layout[1]) if layout else out


@_fused_forward.vjp
def _fused_forward_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    return _backward(primals, cotangent, output, None)


@mx.custom_function
def _blockwise(queries: mx.array, keys: mx.array, values: mx.array, *layout: mx.array) -> tuple[mx.array, mx.array]:
    """Compute attention one block of queries at a time, each over the keys up to the end of the block.

    For a CPU: MLX's own CPU path computes all scores, masked ones too, with the slow exponential. This function keeps
    its inputs and outputs for the backward pass, which recomputes the probabilities (as in arXiv 2205.14135). For
    packed rows, the output is kept in the packed layout that the next layer reads, without a second copy in the grid.

    Args:
        layout: `grid` and `slots` of packed rows; nothing for padded rows.

    Returns:
        attention's output, as in `causal_attention`, and the log-sum-exp of each query's scores, (R, K, G, W, 1).
    """
    outputs: list[mx.array] = []
    grouped, log_sums = _group(queries, keys.shape[1]), []
    for start, stop in _blocks(queries.shape[2]):
        if outputs:  # so that only one block's scores are held at a time
            grouped = cast(mx.array, mx.depends(grouped, outputs[-1]))
        scores = _scores(grouped, keys, start, stop)
        row_max = scores.max(axis=-1, keepdims=True)
        factors = exp(scores - row_max)
        row_sum = factors.sum(axis=-1, keepdims=True)
        outputs.append(_times(factors, values[:, :, :stop]) / row_sum)
        log_sums.append(row_max + mx.log(row_sum))
    flat = _flatten(mx.concatenate(outputs, axis=3).reshape(queries.shape))
    return _take(flat, layout[1]) if layout else flat, mx.concatenate(log_sums, axis=3)


@_blockwise.vjp
def _blockwise_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    return _backward(primals, cotangents[0], outputs[0], outputs[1])


def _backward(
    primals: tuple[mx.array, ...], d_output: mx.array, output: mx.array, log_sums: mx.array | None
) -> tuple[mx.array, ...]:
    """Compute the gradients of queries, keys and values, one block of queries at a time.

    With P the probabilities, dO the gradient of the output O, and o the row sums of dO * O:

        dV = P^T dO        dS = P * (dO V^T - o)        dQ = dS K        dK = dS^T Q

    Args:
        primals: queries, keys, values, and the index maps of packed rows.
        d_output, output: (T or R W, H d), the gradient of attention's output, and that output.
        log_sums: the log-sum-exp of each query's scores, (R, K, G, W, 1); None: compute the softmax again.

    Returns:
        the gradients, in the shapes of `primals`; zeros for the index maps.
    """
    queries, keys, values, *layout = primals
    num_rows, heads, width, _ = queries.shape
    d_dot_output = (d_output.astype(mx.float32) * output).reshape(len(d_output), heads, -1).sum(axis=-1)  # o

    def in_grid(flat: mx.array) -> mx.array:
        """Arrange by heads in the grid: (T or R W, H c) -> (R, K, G, W, c)."""
        rows = _take(flat, layout[0].reshape(-1)) if layout else flat
        return _group(rows.reshape(num_rows, width, heads, -1).transpose(0, 2, 1, 3), keys.shape[1])

    d_heads, d_dot_heads = in_grid(d_output), in_grid(d_dot_output)
    grouped = _group(queries, keys.shape[1])
    d_queries: list[mx.array] = []
    d_keys, d_values = (mx.zeros(array.shape, mx.float32) for array in (keys, values))  # sums over the blocks
    for start, stop in _blocks(width):
        block = slice(start, stop)
        # One block's scores at a time. Without this, mx.compile also keeps the scores of the forward pass.
        grouped = cast(mx.array, mx.depends(grouped, [d_heads, d_keys, d_values]))
        scores = _scores(grouped, keys, start, stop)
        if log_sums is None:
            probabilities = mx.softmax(scores, axis=-1, precise=True)
        else:
            probabilities = exp(scores - log_sums[..., block, :])
        d_scores = probabilities * (
            _times(d_heads[..., block, :], values[:, :, :stop].swapaxes(-1, -2)) - d_dot_heads[..., block, :]
        )
        probabilities, d_scores = probabilities.astype(keys.dtype), d_scores.astype(keys.dtype)
        d_queries.append(_times(d_scores, keys[:, :, :stop]))
        pad = [(0, 0), (0, 0), (0, width - stop), (0, 0)]
        d_keys = d_keys + mx.pad(_sum_over_queries(d_scores, grouped[..., block, :]), pad)
        d_values = d_values + mx.pad(_sum_over_queries(probabilities, d_heads[..., block, :]), pad)
    d_layout = (mx.zeros_like(indices) for indices in layout)
    d_keys, d_values = d_keys.astype(keys.dtype), d_values.astype(values.dtype)
    return (mx.concatenate(d_queries, axis=3).reshape(queries.shape), d_keys, d_values, *d_layout)


def _flatten(heads: mx.array) -> mx.array:
    """Join the heads of each position: (R, H, W, d) -> (R W, H d)."""
    rows, count, width, size = heads.shape
    return heads.transpose(0, 2, 1, 3).reshape(rows * width, count * size)


def _blocks(width: int) -> list[tuple[int, int]]:
    """Split `width` queries into blocks of equal size, at most MLX_QUERY_BLOCK. Return the (start, stop) of each."""
    size = -(-width // -(-width // MLX_QUERY_BLOCK))
    return [(start, min(start + size, width)) for start in range(0, width, size)]


def _group(heads: mx.array, num_groups: int) -> mx.array:
    """Group the query heads by key-value head: (R, H, W, d) -> (R, K, G, W, d), G = H / K."""
    rows, _, width, size = heads.shape
    return heads.reshape(rows, num_groups, -1, width, size)


def _scores(grouped: mx.array, keys: mx.array, start: int, stop: int) -> mx.array:
    """Return the scores of queries `start` to `stop`, (R, K, G, stop - start, stop), -inf for keys after the query."""
    scores = _times(grouped[..., start:stop, :], keys[:, :, :stop].swapaxes(-1, -2))
    masked = mx.arange(stop)[None] > mx.arange(start, stop)[:, None]
    return scores + mx.where(masked, -mx.inf, 0.0)


def _times(left: mx.array, right: mx.array) -> mx.array:
    """Multiply (R, K, G, W, a) by (R, K, a, b) -> (R, K, G, W, b), with one matrix product for each (R, K)."""
    rows, groups, per_group, width, inner = left.shape
    product = left.reshape(rows, groups, per_group * width, inner) @ right
    return product.reshape(rows, groups, per_group, width, -1)


def _sum_over_queries(left: mx.array, right: mx.array) -> mx.array:
    """Multiply (R, K, G, W, a)^T by (R, K, G, W, b) -> (R, K, a, b), summed over the queries of a group."""
    rows, groups, per_group, width, _ = left.shape
    flat = [x.reshape(rows, groups, per_group * width, -1) for x in (left, right)]
    return flat[0].swapaxes(-1, -2) @ flat[1]
