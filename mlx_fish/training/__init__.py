"""Train an adapter: the training command, the training loop and the learning-rate schedule."""
