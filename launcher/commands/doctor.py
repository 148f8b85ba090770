"""`nextpt doctor`: what this machine has, what it lacks, and how to fix that."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launcher.console import console, echo, echo_finding
from launcher.registration import add_command


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
    folder: Annotated[Path, typer.Option(help="folder that runs are written to")] = Path("runs"),
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="TCP port where ranks of deepspeed meet")
    ] = 29500,
) -> None:
    """Say what this machine has and what to do about each lack.

    Exit code 1 when training would not work.
    """
    from launcher.doctor import Status, examine

    with console.status("looking at libraries and the machine") if not as_json else nullcontext():
        findings = examine(folder, port)
    counts = {status: sum(f.status == status for f in findings) for status in Status}
    if as_json:
        print(
            json.dumps(
                {
                    "problems": counts[Status.PROBLEM],
                    "warnings": counts[Status.WARNING],
                    "findings": [asdict(f) for f in findings],
                },
                indent=1,
            )
        )
    else:
        for finding in findings:
            echo_finding(finding.subject, finding.status, finding.found, finding.advice)
        echo(f"\n{counts[Status.PROBLEM]} problems, {counts[Status.WARNING]} warnings")
    sys.exit(1 if counts[Status.PROBLEM] else 0)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app, "doctor", doctor, example="nextpt doctor    nextpt doctor --json | jq .problems"
    )
