"""Fine-tune a small language model on your own questions and answers, on your own Mac."""

__version__ = "0.1.0"
