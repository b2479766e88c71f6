"""Read GGUF files: the container, the model in it, its tokenizer."""
