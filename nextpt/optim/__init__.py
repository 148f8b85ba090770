"""Optimizers and learning-rate schedules. Knows nothing of the training loop."""
