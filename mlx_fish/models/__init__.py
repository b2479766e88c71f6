"""Models: resolve a name to a local folder, read model folders and GGUF files, and convert them."""
