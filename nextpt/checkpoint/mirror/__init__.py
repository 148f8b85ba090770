"""Mirror of a run's checkpoints in an object store: upload in the background, restore at a start."""
