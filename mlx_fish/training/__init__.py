"""Train: the loop over updates and the learning-rate schedule."""
