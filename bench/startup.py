"""Start-up of the command line: CPU time of every help text, beside Python's and Typer's own.

    python -m bench.startup [--runs 5] [--json FILE]

CPU time is user and system time of one process, from its start to its end; each figure is the
median of several runs. `ratio` divides it by the CPU time of `python -c 'import typer'`, so that
machines can be compared. Exit code 1 when a help text takes more than LIMIT.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.4  # CPU seconds
REFERENCES = {"python -c pass": ["-c", "pass"], "python -c 'import typer'": ["-c", "import typer"]}
TYPER = "python -c 'import typer'"


def command_paths() -> list[tuple[str, ...]]:
    """Return every command and group of `nextpt`, as words of the command line; () is nextpt."""
    from typer.main import get_command

    from launcher.cli import app

    return list(_walk(get_command(app), ()))


def _walk(command: object, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from _walk(child, (*path, name))


def cpu_seconds(arguments: Sequence[str]) -> float:
    """Return the CPU time, user and system, of one Python process with these arguments."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def measure(runs: int) -> dict[str, float]:
    """Return the median CPU seconds of the references and of every help text."""
    cases = dict(REFERENCES)
    for path in command_paths():
        cases[" ".join(["nextpt", *path, "--help"])] = ["-m", "launcher.cli", *path, "--help"]
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(runs):  # in turn, so that a disturbance of the machine meets all of them
        for name, arguments in cases.items():
            samples[name].append(cpu_seconds(arguments))
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> int:
    """Print the table; returns 1 when a help text takes more than LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="runs of each command")
    parser.add_argument("--json", type=Path, help="file to write the medians to")
    options = parser.parse_args()
    medians = measure(options.runs)
    print(f"{'command':<48} {'CPU s':>7} {'ratio':>7}")
    for name, seconds in medians.items():
        print(f"{name:<48} {seconds:>7.3f} {seconds / medians[TYPER]:>7.2f}")
    helps = {name: seconds for name, seconds in medians.items() if name not in REFERENCES}
    slowest = max(helps, key=lambda name: helps[name])
    print(f"slowest: {slowest}, {helps[slowest]:.3f} CPU s; the limit is {LIMIT} CPU s")
    if options.json:
        result = {"cpu_seconds": medians, "runs": options.runs, "limit": LIMIT}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(helps[slowest] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
