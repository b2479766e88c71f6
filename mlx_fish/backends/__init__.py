"""Compute with a framework: one protocol, two implementations (`mlx/`, `torch/`), and the choice between them."""
