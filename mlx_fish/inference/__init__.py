"""Answer questions with a base or tuned model."""
