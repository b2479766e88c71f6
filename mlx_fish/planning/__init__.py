"""Everything decided before a model loads: rows, layers and updates, peak memory, time."""
