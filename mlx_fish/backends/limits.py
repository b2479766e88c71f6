"""How much each backend computes at a time, by device. The plan of memory needs these numbers too, without a framework."""

USABLE_MEMORY = 0.8
"""The share of what a program may hold that a run takes: the allocator keeps buffers, and the display needs memory too."""

MLX_LOSS_CHUNK_BYTES = {"cpu": 8 << 20, "gpu": 32 << 20}
"""Float32 logits of the loss held at a time. On a CPU what fits its cache takes no longer, and a fifth less memory in all."""

MLX_LOSS_MIN_CHUNK, MLX_LOSS_MAX_CHUNK = 1024, 16_384
"""Columns in a chunk. With more, a BLAS that adds a short row's terms up one by one would lose the small ones after a large one."""

MLX_QUERY_BLOCK = 128
"""Queries of attention at a time: bounds the scores held, and skips most of those that the mask hides."""

TORCH_POSITIONS = {"cpu": 256, "metal": 4096, "cuda": 8192}
"""Positions of a batch at a time. Activations grow with it, the gradient's sum does not change. A CPU gains 7 % from twice as
many, for a gigabyte (docs/results.md); a GPU would idle with fewer."""
