"""Runs in which something happens at a chosen moment, one after another in one process.

`python -m tests.support.job_probe OUT CASE=CONFIG ...`
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nextpt.base.errors import TrainingStopped, UserError
from nextpt.config import Config, load_config
from nextpt.data.loader import Loader
from nextpt.job.lock import RunLock
from nextpt.train import run
from nextpt.train.engine import Engine
from nextpt.train.zero_state import ZeroState
from tests.support.signals import send_signal


def before(owner: type | Any, name: str, action: Callable[[int], None]) -> Any:
    """Run action(n) before the n-th call of a function, counted from 1."""
    original, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        action(len(calls))
        return original(*args, **kwargs)

    return patch.object(owner, name, wrapped)


def signal_at(when: int) -> Callable[[int], None]:
    """Return an action that sends SIGTERM to this process at call `when`."""
    return lambda n: send_signal(signal.SIGTERM) if n == when else None


def crash(n: int) -> None:
    if n == 3:
        raise RuntimeError("the third batch")


def sleep(n: int) -> None:
    if n == 4 and os.environ["RANK"] == "1":
        time.sleep(600)


def another_takes_over(config: Config) -> Callable[[int], None]:
    return lambda n: (
        (config.run_dir / "lock-99.json").write_text(
            '{"pid": 7, "host": "elsewhere", "machine": "another", "since": 0, "held": true}'
        )
        and None
    )


def case(name: str, config: Config) -> Any:
    return {
        "starting": lambda: before(run, "open_run_folder", signal_at(1)),
        "validating": lambda: before(Loader, "validation_batches", signal_at(1)),
        # Step 2 is the first validation, of two domains: the third call is of an average
        "validating an average": lambda: before(Loader, "validation_batches", signal_at(3)),
        "saving": lambda: before(ZeroState, "fragments", signal_at(1)),
        "crashing": lambda: before(Loader, "step_batches", crash),
        "sleeping": lambda: before(Engine, "step", sleep),
        "taken": lambda: before(ZeroState, "fragments", another_takes_over(config)),
        "finishing": lambda: before(RunLock, "release", signal_at(1)),
    }[name]()


def main(out: str, cases: list[str]) -> None:
    outcomes = {}
    for text in cases:
        name, _, path = text.partition("=")
        config = load_config(path)
        outcome: list[Any] = ["finished", "", 0]
        with case(name, config):
            try:
                run.run_training(config)
            except (UserError, TrainingStopped) as error:
                outcome = [type(error).__name__, str(error), error.exit_code]
            except Exception as error:
                outcome = [type(error).__name__, str(error), 1]
        outcomes[name] = outcome
    Path(out).write_text(json.dumps(outcomes))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
