"""Reading what happened: trackers and reports. Nothing here steers a run."""
