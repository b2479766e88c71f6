"""Prompt templates: render conversations into token ids and a mask of the supervised tokens."""
