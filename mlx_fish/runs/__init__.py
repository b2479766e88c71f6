"""Manage a training run on disk: folder and lock, checkpoints, resume, run.json and model card."""
