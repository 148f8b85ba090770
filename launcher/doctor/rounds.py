"""All checks, one after the other."""

from __future__ import annotations

from pathlib import Path

from launcher.doctor.finding import Finding
from launcher.doctor.leftovers import examine_leftovers
from launcher.doctor.machine import examine_machine
from launcher.doctor.software import examine_software, probe


def examine(folder: Path, port: int) -> list[Finding]:
    """Everything the doctor has to say, software first. folder: where runs are written. port: where ranks meet."""
    return [*examine_software(probe()), *examine_machine(folder, port), *examine_leftovers()]
