"""Small tasks that need no download: exact match and the smooth metrics beneath it."""
