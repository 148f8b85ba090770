"""Progress callbacks of long evaluations, and those that do nothing."""

from __future__ import annotations

from collections.abc import Callable

# Called with the share of the work that is done, 0 to 1
Progress = Callable[[float], None]
# Called with the name of a part (a domain, a task, a phase) and the share of it that is done
PartProgress = Callable[[str, float], None]


def ignore_progress(share: float) -> None:
    """`Progress` that does nothing."""


def ignore_part_progress(part: str, share: float) -> None:
    """`PartProgress` that does nothing."""
