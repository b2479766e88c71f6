"""A training run on disk: its folder and lock, checkpoints, resume, run.json, the model card."""
