"""Find, read and convert models: a name to a local folder, a folder or GGUF file to tensors."""
