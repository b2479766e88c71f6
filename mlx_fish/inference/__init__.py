"""Generate answers with a base or fine-tuned model."""
