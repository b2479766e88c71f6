"""Causal self-attention for training, over rows that are padded to a grid or laid end to end in one sequence.

Linear layers meet a packed batch as it lies, (1, T, D): no padding. Attention alone sees the grid (R, W) of its rows, so a token
can only look at its own row, and rotary positions begin anew in each.
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
    """Where the rows of a flat sequence lie. Takes the place of a mask.

    Attributes:
        grid: (R, W) int32, the flat position of each token of each row, -1 behind its end.
        slots: (T,) int32, the place in the flattened grid of each flat position, -1 for a pad.
    """

    grid: mx.array
    slots: mx.array


class Attention(nn.Module):
    """The attention of a qwen2 or llama block, with the projections of mlx-lm's that it replaces."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            attention[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.rope, self.scale = attention.rope, attention.scale
        self.num_heads, self.num_kv_heads = attention.n_heads, attention.n_kv_heads

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """(B, L, D) -> (B, L, D); (1, T, D) when `mask` is PackedRows."""
        batch, length = x.shape[:2]
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if isinstance(mask, PackedRows):
            rows, width = mask.grid.shape
            queries, keys, values = (_to_grid(flat[0], mask.grid, mask.slots) for flat in (queries, keys, values))
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
            packed = mask if isinstance(mask, PackedRows) else None
            flat = causal_attention(self.rope(queries) * self.scale, self.rope(keys), values, packed)
            return cast(mx.array, self.o_proj(flat.reshape(batch, length, -1)))
        else:
            queries, keys = self.rope(queries), self.rope(keys)
            out = scaled_dot_product_attention(queries, keys, values, cache=None, scale=self.scale, mask=mask)
        return cast(mx.array, self.o_proj(_flatten(out).reshape(batch, length, -1)))


def _take(rows: mx.array, indices: mx.array) -> mx.array:
    """rows[indices], and zeros where an index is negative."""
    return rows[mx.maximum(indices, 0)] * (indices >= 0).astype(rows.dtype)[:, None]


@mx.custom_function
def _to_grid(flat: mx.array, grid: mx.array, slots: mx.array) -> mx.array:
    """(T, C) -> (R * W, C). Its gradient is `_from_grid`, a gather: MLX's own would scatter."""
    return _take(flat, grid.reshape(-1))


@_to_grid.vjp
def _to_grid_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    _, grid, slots = primals
    return _take(cotangent, slots), mx.zeros_like(grid), mx.zeros_like(slots)


@mx.custom_function
def _from_grid(gridded: mx.array, grid: mx.array, slots: mx.array) -> mx.array:
    """(R * W, C) -> (T, C)."""
    return _take(gridded, slots)


@_from_grid.vjp
def _from_grid_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    _, grid, slots = primals
    return _take(cotangent, grid.reshape(-1)), mx.zeros_like(grid), mx.zeros_like(slots)


def causal_attention(queries: mx.array, keys: mx.array, values: mx.array, packed: PackedRows | None = None) -> mx.array:
    """softmax(Q K^T + causal mask) V, with queries scaled already.

    Args:
        queries: (R, H, W, d).
        keys, values: (R, K, W, d), H a multiple of K (grouped queries, arXiv 2305.13245).

    Returns:
        (T, H d) where the rows are packed, (R W, H d) where they are not.
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
    """MLX's fused attention. For Metal, whose fused kernel has no backward: differentiated by MLX itself it would fall back to
    plain products and keep all (R, H, W, W) probabilities of every layer."""
    out = _flatten(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask="causal"))
    return _take(out, layout[1]) if layout else out


@_fused_forward.vjp
def _fused_forward_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    return _backward(primals, cotangent, output, None)


@mx.custom_function
def _blockwise(queries: mx.array, keys: mx.array, values: mx.array, *layout: mx.array) -> tuple[mx.array, mx.array]:
    """Attention a block of queries at a time over the keys up to it, and the log-sum-exp of each query's scores (R, K, G, W, 1).

    Only these are kept for the backward pass, which computes the probabilities again (as in arXiv 2205.14135). MLX's own CPU path
    computes all scores, hidden ones too, with the slow exponential. `layout` is that of packed rows, or nothing: what is kept is
    what the next layer reads, not a second copy in the grid.
    """
    outs: list[mx.array] = []
    grouped, totals = _group(queries, keys.shape[1]), []
    for start, stop in _blocks(queries.shape[2]):
        if outs:  # one block's scores at a time
            grouped = cast(mx.array, mx.depends(grouped, outs[-1]))
        scores = _scores(grouped, keys, start, stop)
        top = scores.max(axis=-1, keepdims=True)
        factors = exp(scores - top)
        total = factors.sum(axis=-1, keepdims=True)
        outs.append(_times(factors, values[:, :, :stop]) / total)
        totals.append(top + mx.log(total))
    flat = _flatten(mx.concatenate(outs, axis=3).reshape(queries.shape))
    return _take(flat, layout[1]) if layout else flat, mx.concatenate(totals, axis=3)


@_blockwise.vjp
def _blockwise_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    return _backward(primals, cotangents[0], outputs[0], outputs[1])


def _backward(
    primals: tuple[mx.array, ...], d_flat: mx.array, flat: mx.array, totals: mx.array | None
) -> tuple[mx.array, ...]:
    """Gradients of queries, keys, values (and zeros for the layout), a block of queries at a time.

    Args:
        d_flat, flat: the gradient of attention's output, and that output.
        totals: the log-sum-exp of each query's scores, (R, K, G, W, 1); None: computed again.
    """
    queries, keys, values, *layout = primals
    num_rows, heads, width, _ = queries.shape
    # For each query and head, the sum of its gradients times its output: what softmax's backward takes from each score.
    flat_shares = (d_flat.astype(mx.float32) * flat).reshape(len(d_flat), heads, -1).sum(axis=-1)

    def in_grid(flat: mx.array) -> mx.array:
        """(T or R W, H c) -> (R, K, G, W, c)."""
        rows = _take(flat, layout[0].reshape(-1)) if layout else flat
        return _group(rows.reshape(num_rows, width, heads, -1).transpose(0, 2, 1, 3), keys.shape[1])

    d_out, shares = in_grid(d_flat), in_grid(flat_shares)
    grouped = _group(queries, keys.shape[1])
    d_queries: list[mx.array] = []
    d_keys, d_values = (mx.zeros(array.shape, mx.float32) for array in (keys, values))  # sums of blocks
    for start, stop in _blocks(width):
        part = slice(start, stop)
        # One block's scores at a time; and without this, mx.compile keeps the forward's after all.
        grouped = cast(mx.array, mx.depends(grouped, [d_out, d_keys, d_values]))
        scores = _scores(grouped, keys, start, stop)
        if totals is None:
            probabilities = mx.softmax(scores, axis=-1, precise=True)
        else:
            probabilities = exp(scores - totals[..., part, :])
        d_scores = probabilities * (
            _times(d_out[..., part, :], values[:, :, :stop].swapaxes(-1, -2)) - shares[..., part, :]
        )
        probabilities, d_scores = probabilities.astype(keys.dtype), d_scores.astype(keys.dtype)
        d_queries.append(_times(d_scores, keys[:, :, :stop]))
        pad = [(0, 0), (0, 0), (0, width - stop), (0, 0)]
        d_keys = d_keys + mx.pad(_over_queries(d_scores, grouped[..., part, :]), pad)
        d_values = d_values + mx.pad(_over_queries(probabilities, d_out[..., part, :]), pad)
    d_layout = (mx.zeros_like(indices) for indices in layout)
    d_keys, d_values = d_keys.astype(keys.dtype), d_values.astype(values.dtype)
    return (mx.concatenate(d_queries, axis=3).reshape(queries.shape), d_keys, d_values, *d_layout)


def _flatten(heads: mx.array) -> mx.array:
    """(R, H, W, d) -> (R W, H d)."""
    rows, count, width, size = heads.shape
    return heads.transpose(0, 2, 1, 3).reshape(rows * width, count * size)


def _blocks(width: int) -> list[tuple[int, int]]:
    """Equal blocks of at most MLX_QUERY_BLOCK queries."""
    size = -(-width // -(-width // MLX_QUERY_BLOCK))
    return [(start, min(start + size, width)) for start in range(0, width, size)]


def _group(heads: mx.array, num_groups: int) -> mx.array:
    """(R, H, W, d) -> (R, K, H / K, W, d)."""
    rows, _, width, size = heads.shape
    return heads.reshape(rows, num_groups, -1, width, size)


def _scores(grouped: mx.array, keys: mx.array, start: int, stop: int) -> mx.array:
    """(R, K, G, stop - start, stop), -inf where a key comes after its query."""
    scores = _times(grouped[..., start:stop, :], keys[:, :, :stop].swapaxes(-1, -2))
    hidden = mx.arange(stop)[None] > mx.arange(start, stop)[:, None]
    return scores + mx.where(hidden, -mx.inf, 0.0)


def _times(left: mx.array, right: mx.array) -> mx.array:
    """(R, K, G, W, a) x (R, K, a, b) -> (R, K, G, W, b), as one product for each (R, K)."""
    rows, groups, per_group, width, inner = left.shape
    product = left.reshape(rows, groups, per_group * width, inner) @ right
    return product.reshape(rows, groups, per_group, width, -1)


def _over_queries(left: mx.array, right: mx.array) -> mx.array:
    """(R, K, G, W, a)^T x (R, K, G, W, b) -> (R, K, a, b), summed over a group's queries."""
    rows, groups, per_group, width, _ = left.shape
    flat = [x.reshape(rows, groups, per_group * width, -1) for x in (left, right)]
    return flat[0].swapaxes(-1, -2) @ flat[1]
