"""Training: the step, the loop, schedule, optimizer and the DeepSpeed engine."""
