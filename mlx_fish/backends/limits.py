"""Set the sizes of the pieces that each backend computes at a time, by device.

Imports no framework, because the memory planner needs these numbers too.
"""

USABLE_MEMORY = 0.8
"""Fraction of a program's available memory that a run may use. The rest is for buffers that the allocator keeps
and for the display."""

MLX_LOSS_CHUNK_BYTES = {"cpu": 8 << 20, "gpu": 32 << 20}
"""Maximum size of one chunk of the loss's float32 logits, bytes. On a CPU a chunk that fits the cache is as fast
as a larger one, and peak memory is a fifth lower."""

MLX_LOSS_MIN_CHUNK, MLX_LOSS_MAX_CHUNK = 1024, 16_384
"""Minimum and maximum number of vocabulary entries in a chunk. In a longer chunk, a BLAS that adds a short row's
terms one by one would lose the small terms that follow a large one."""

MLX_QUERY_BLOCK = 128
"""Maximum number of attention queries in a block. Limits the scores held at a time, and skips most of the masked
ones."""

TORCH_POSITIONS = {"cpu": 256, "metal": 4096, "cuda": 8192}
"""Maximum number of positions in one forward and backward pass. Activation memory grows with it; the gradient
does not depend on it. On a CPU, twice as many would be 7 % faster but need another gigabyte (docs/results.md);
a GPU would idle with fewer."""
