"""Evaluate a model on a data set: loss and perplexity."""
