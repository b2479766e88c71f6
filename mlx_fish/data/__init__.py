"""From files to batches: examples with their file and line, prompt templates, token ids, batches in a reproducible order."""
