"""Lossless compression of files by a model's predictions."""
