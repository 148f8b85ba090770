"""Benchmarks of the kernels, each side by side with its peers in the same run."""
