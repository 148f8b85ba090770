"""From shards to micro-batches: rows, their global order, batches."""
