"""Verify exported models with independent readers, each in its own process."""
