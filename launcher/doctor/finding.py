"""What the doctor says of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """ok: as it should be. note: worth knowing. warning: will hurt some runs. problem: training does not work."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """subject: what was looked at. found: what is there. advice: what to do, for all but what is well."""

    subject: str
    status: Status
    found: str
    advice: str = ""


def ok(subject: str, found: str) -> Finding:
    return Finding(subject, Status.OK, found)


def note(subject: str, found: str, advice: str = "") -> Finding:
    return Finding(subject, Status.NOTE, found, advice)


def warning(subject: str, found: str, advice: str) -> Finding:
    return Finding(subject, Status.WARNING, found, advice)


def problem(subject: str, found: str, advice: str) -> Finding:
    return Finding(subject, Status.PROBLEM, found, advice)
