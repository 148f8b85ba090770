"""Memorization: extraction of training text, canaries, and contamination of evaluation sets."""
