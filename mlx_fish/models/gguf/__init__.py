"""GGUF reading: the container, the model and the tokenizer."""
