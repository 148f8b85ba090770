"""Checks of `nextpt doctor`: libraries, machine, leftovers of killed processes."""

from launcher.doctor.finding import Finding, Status
from launcher.doctor.rounds import examine

__all__ = ["Finding", "Status", "examine"]
