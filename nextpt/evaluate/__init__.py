"""Nats, bits, perplexity, bits per byte: per domain and in total."""
