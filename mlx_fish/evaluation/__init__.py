"""Measure a model on a data set."""
