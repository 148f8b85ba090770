"""Jobs: how training processes are started and watched."""
