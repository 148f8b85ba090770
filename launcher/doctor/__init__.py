"""`nextpt doctor`: what this machine has, and what to do about each lack."""

from launcher.doctor.finding import Finding, Status
from launcher.doctor.rounds import examine

__all__ = ["Finding", "Status", "examine"]
