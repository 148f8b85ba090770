"""Supervision: restart a training that hung, crashed or was killed, from its last checkpoint."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from nextpt.base.errors import EXIT_CRASHED, EXIT_HUNG
from nextpt.checkpoint.folders import steps
from nextpt.events import read_events
from nextpt.job.exit_record import read_exit_record

RESTARTS = 3
# Signals that a user or a scheduler sends on purpose; ranks ended by others are restarted.
_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def supervise(start: Callable[[], int], run: Path, restarts: int) -> int:
    """Start a training, and again while that can help.

    User errors, requested stops, and crashes before the first step of a start are not retried: the
    next start would only repeat them.

    Args:
        start: Trains to the end; returns the exit code.
        run: The run folder.
        restarts: Maximum restarts in a row without a new checkpoint.

    Returns:
        The exit code of the last start.
    """
    restarts_left, newest = restarts, _newest_checkpoint(run)
    while True:
        step_before = _last_step(run)
        code = start()
        checkpoint = _newest_checkpoint(run)
        if checkpoint > newest:
            restarts_left, newest = restarts, checkpoint
        progressed = code != EXIT_CRASHED or _last_step(run) > step_before
        if restarts_left == 0 or not _is_failure(code) or not progressed:
            return code
        restarts_left -= 1
        record = read_exit_record(run)
        plural = "" if restarts_left == 1 else "s"
        print(
            f"nextpt: training ended with {code} ({record['reason'] if record else 'killed'});"
            f" restarting from step {checkpoint}, {restarts_left} more restart{plural} without a"
            " new checkpoint",
            file=sys.stderr,
            flush=True,
        )


def _is_failure(code: int) -> bool:
    return code in (EXIT_CRASHED, EXIT_HUNG) or (code > 128 and code - 128 not in _REQUESTS)


def _newest_checkpoint(run: Path) -> int:
    return max(steps(run / "checkpoints"), default=0)


def _last_step(run: Path) -> int:
    return max((event["step"] for event in read_events(run / "metrics.jsonl", "train")), default=0)
