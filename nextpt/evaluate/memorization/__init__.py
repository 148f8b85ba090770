"""What a model has by heart, and what of an evaluation set was in its training data."""
