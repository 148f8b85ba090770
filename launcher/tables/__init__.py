"""Tables in which commands print results."""
