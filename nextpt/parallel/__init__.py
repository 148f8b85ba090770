"""Layouts of a run over devices: named process groups."""
