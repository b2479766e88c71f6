"""Data pipeline: read examples, apply prompt templates, tokenise, and batch in a reproducible order."""
