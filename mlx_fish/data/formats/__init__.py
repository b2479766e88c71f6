"""The formats of data sets: one row to conversation turns, and LLaMA-Factory's dataset_info.json."""
