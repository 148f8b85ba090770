"""Causal attention and vocabulary cross-entropy: implementations, what each can do, and the choice per device."""
