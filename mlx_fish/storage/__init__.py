"""Files: writes that are complete or absent, and safetensors as NumPy arrays."""
