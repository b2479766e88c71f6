"""Storage: atomic file and folder writes, and safetensors files as NumPy arrays."""
