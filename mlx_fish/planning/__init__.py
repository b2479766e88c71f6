"""Plan a run before a model loads: rows, layers, number of updates, peak memory and time."""
