"""Trials of kernels in a child process: what crashes or hangs there takes no job with it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection

from kernels.trials import Shape, Trial, try_in_turn
from nextpt.base.processes import exit_with_parent

SECONDS = 180.0  # for one candidate, with the start of the process and its compilation


def run_trials(
    candidates: Mapping[str, str], shape: Shape, device: str, seconds: float = SECONDS
) -> list[Trial]:
    """Try every candidate; one that ends the process or takes too long is a trial with a reason.

    Args:
        candidates: name -> function, as "module:name"; see `function_paths` of the operators.
        shape: what they have to compute.
        device: torch device.
        seconds: that one candidate may take.
    """
    left, trials = dict(candidates), []
    while left:
        done, reason = _try_in_child(left, shape, device, seconds)
        trials += done
        for trial in done:
            del left[trial.name]
        if left:
            name = next(iter(left))
            del left[name]
            trials.append(Trial(name, reason=reason))
    return trials


def _try_in_child(
    candidates: Mapping[str, str], shape: Shape, device: str, seconds: float
) -> tuple[list[Trial], str]:
    """Trials that ended, in the order of the candidates, and why the next one did not."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(sender, dict(candidates), shape, device), daemon=True
    )
    process.start()
    sender.close()
    trials: list[Trial] = []
    try:
        while len(trials) < len(candidates):
            if not receiver.poll(seconds):
                return trials, f"it takes longer than {seconds:g} s"
            trials.append(receiver.recv())
    except EOFError:
        process.join()
        return trials, f"its process ended with {_exit_code(process.exitcode)}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    return trials, ""


def _work(connection: Connection, candidates: dict[str, str], shape: Shape, device: str) -> None:
    exit_with_parent()
    try_in_turn(connection, candidates, shape, device)


def _exit_code(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"code {code}"
