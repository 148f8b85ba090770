"""Training: loop, optimizer step on DeepSpeed, validation, checkpoints, rollback, startup."""
