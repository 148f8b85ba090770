"""Data room: from shards to micro-batches (sequences, their global order, batches)."""
