"""Findings of the doctor: one subject, its status, and a fix."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """Status of a finding: ok, worth knowing, a risk for some runs, or training does not work."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        subject: What was checked.
        status: Its status.
        observed: What the check observed.
        advice: The fix; empty for the status ok.
    """

    subject: str
    status: Status
    observed: str
    advice: str = ""


def ok(subject: str, observed: str) -> Finding:
    """Return a finding that needs nothing."""
    return Finding(subject, Status.OK, observed)


def note(subject: str, observed: str, advice: str = "") -> Finding:
    """Return a finding worth knowing."""
    return Finding(subject, Status.NOTE, observed, advice)


def warning(subject: str, observed: str, advice: str) -> Finding:
    """Return a finding that is a risk for some runs."""
    return Finding(subject, Status.WARNING, observed, advice)


def problem(subject: str, observed: str, advice: str) -> Finding:
    """Return a finding with which training does not work."""
    return Finding(subject, Status.PROBLEM, observed, advice)
