"""Raw corpora to packed, tokenized MDS shards, and the contract of those shards."""
