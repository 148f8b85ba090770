"""`nextpt doctor`: check libraries and machine, with a fix for each problem."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launcher.console import console, echo, echo_finding
from launcher.options import PrintJson
from launcher.registration import add_command


def doctor(
    as_json: PrintJson = False,
    folder: Annotated[Path, typer.Option(help="folder that runs are written to")] = Path("runs"),
    port: Annotated[
        int,
        typer.Option(min=1, max=65535, help="TCP port of deepspeed's rendezvous of the ranks"),
    ] = 29500,
) -> None:
    """Check libraries and machine and print a fix for each problem.

    Exit code 1 when training would not work.
    """
    from launcher.doctor import Status, examine

    with nullcontext() if as_json else console.status("checking libraries and the machine"):
        findings = examine(folder, port)
    counts = {status: sum(f.status == status for f in findings) for status in Status}
    problems, warnings = counts[Status.PROBLEM], counts[Status.WARNING]
    if as_json:
        result = {
            "problems": problems,
            "warnings": warnings,
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(result, indent=1))
    else:
        for finding in findings:
            echo_finding(finding.subject, finding.status, finding.observed, finding.advice)
        echo(f"\n{problems} problems, {warnings} warnings")
    sys.exit(1 if problems else 0)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app, "doctor", doctor, example="nextpt doctor    nextpt doctor --json | jq .problems"
    )
