"""Write a tuned model for other programs: merge adapter and base, one target format a file, and check the result."""
