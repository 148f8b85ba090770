"""Lossless coding of files by a model's predictions: what a code length is worth when it has to be a file."""
