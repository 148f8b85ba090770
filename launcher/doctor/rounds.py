"""All checks of the doctor."""

from __future__ import annotations

from pathlib import Path

from launcher.doctor.finding import Finding
from launcher.doctor.kernels import examine_kernels
from launcher.doctor.leftovers import examine_leftovers
from launcher.doctor.machine import examine_machine
from launcher.doctor.software import examine_software, probe


def examine(folder: Path, port: int) -> list[Finding]:
    """Run all checks, software first.

    Args:
        folder: Folder that runs are written to.
        port: Port of the rendezvous of the ranks.
    """
    return [
        *examine_software(probe()),
        *examine_kernels(),
        *examine_machine(folder, port),
        *examine_leftovers(),
    ]
