"""Causal attention and vocabulary cross-entropy: implementations, and the choice among them."""
