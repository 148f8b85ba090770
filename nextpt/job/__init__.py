"""What surrounds a training job: run-folder lock, signals, watchdog, exit record, environment."""
