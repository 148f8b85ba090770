"""Checkpoints: format, commit protocol, verification, retention, resume, mirror. No pickle."""
