"""Data set formats: parsing one row into conversation turns, and LLaMA-Factory's dataset_info.json."""
