"""Starting a training again after it hung, crashed or was killed, from its last checkpoint."""

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
# Signals that are somebody's wish; all others that end a rank are an accident.
_WISHES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def supervise(start: Callable[[], int], run: Path, restarts: int) -> int:
    """Call start() (a whole training.

    Returns its exit code) again while that helps; returns the last code.

    restarts: how often in a row without a new checkpoint. What a person must mend, or wished, is
    not tried again; nor is a crash before the first step, which the next start would only repeat.
    """
    left, newest = restarts, _newest(run)
    while True:
        before = _last_step(run)
        code = start()
        saved = _newest(run)
        if saved > newest:
            left, newest = restarts, saved
        if (
            left == 0
            or not _is_accident(code)
            or (code == EXIT_CRASHED and _last_step(run) <= before)
        ):
            return code
        left -= 1
        end = read_exit_record(run)
        print(
            f"nextpt: training ended with {code} ({end['reason'] if end else 'killed'}); starting"
            f" it again after step {saved}, {left} more such start{'s' * (left != 1)} if no"
            " checkpoint comes between",
            file=sys.stderr,
            flush=True,
        )


def _is_accident(code: int) -> bool:
    return code in (EXIT_CRASHED, EXIT_HUNG) or (code > 128 and code - 128 not in _WISHES)


def _newest(run: Path) -> int:
    return max(steps(run / "checkpoints"), default=0)


def _last_step(run: Path) -> int:
    return max((event["step"] for event in read_events(run / "metrics.jsonl", "train")), default=0)
