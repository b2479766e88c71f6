"""Backends: one protocol, its MLX and PyTorch implementations (`mlx/`, `torch/`), and the choice between them."""
