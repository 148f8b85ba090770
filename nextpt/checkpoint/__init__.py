"""Checkpoints: their form, how they come to exist, and how they are read. No pickle anywhere."""
