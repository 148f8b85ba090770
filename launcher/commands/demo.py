"""`nextpt demo`: the whole path on the CPU in minutes."""

from __future__ import annotations

import typer

from launcher.registration import add_command


def demo() -> None:
    """Corpus, training, resume, evaluation, samples and report on this CPU in minutes.

    The same as `make demo`.
    """
    from launcher.demo import main as run_demo

    run_demo()


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(app, "demo", demo)
