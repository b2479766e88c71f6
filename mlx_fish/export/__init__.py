"""Export a tuned model: merge adapter and base, write each target format, and verify the result."""
