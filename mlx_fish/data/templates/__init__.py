"""Prompt templates: a conversation to token ids and a mask of the supervised ones."""
