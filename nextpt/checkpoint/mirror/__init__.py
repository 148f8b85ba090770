"""Mirror of a run's checkpoints in an object store: background upload, restore at a start."""
