"""Signals while the main thread is inside a library, the second signal, and the exit record."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

import nextpt.job.signals as signals
from nextpt.base.errors import ConfigError, RunInUseError, TrainingStopped
from nextpt.job.exit_record import read_exit_record, record_exit
from nextpt.job.signals import listen_for_signals
from tests.support.signals import send_signal

WAITS = """
import ctypes, sys, threading
import nextpt.job.signals as stop
stop.REPEAT_SECONDS = float("inf")
record = stop.StopRequest.record

def record_and_report(self, number):
    record(self, number)
    print("recorded", flush=True)

def let_repetitions_end():
    sys.stdin.readline()
    stop.REPEAT_SECONDS = 0.0
    print("from now on", flush=True)

stop.StopRequest.record = record_and_report
threading.Thread(target=let_repetitions_end, daemon=True).start()
with stop.listen_for_signals():
    print("ready", flush=True)
    mutex = (ctypes.c_char * 64)()
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    # waits forever, and no signal brings it back to Python
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_signal_is_recorded_and_handlers_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_SECONDS", math.inf)  # a second one would end this process
    before = signal.getsignal(signal.SIGTERM)
    with listen_for_signals() as request:
        assert request.seconds_left(30) is None and request.signal_name is None
        sent = time.monotonic()
        send_signal(signal.SIGUSR1)
        left = request.seconds_left(30)
        assert request.signal_name == "SIGUSR1" and 30 - (time.monotonic() - sent) <= left <= 30
        send_signal(signal.SIGTERM)  # the same signal by another path
        assert request.signal_name == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.process
def test_a_second_signal_ends_a_process_blocked_in_a_library() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline().startswith("SIGTERM: saving after this step")
        assert process.stdout.readline() == "recorded\n"
        process.send_signal(signal.SIGTERM)  # at once: a repetition
        assert process.stdout.readline() == "recorded\n"
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "from now on\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == 75
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("raised", "code", "reason"),
    [
        (None, 0, "finished"),
        (TrainingStopped("stopped by SIGTERM"), 75, "stopped by SIGTERM"),
        (ConfigError("a key"), 2, "a key"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt:"),
    ],
)
def test_every_way_to_end_is_recorded(
    tmp_path: Path, raised: BaseException | None, code: int, reason: str
) -> None:
    expected = pytest.raises(type(raised)) if raised else nullcontext()
    with expected as caught, record_exit(tmp_path) as record:
        assert read_exit_record(tmp_path) is None
        record.step = 7
        if raised:
            raise raised
    assert caught is None or caught.value is raised
    exit_record = json.loads((tmp_path / "exit.json").read_text())
    assert (
        exit_record["code"],
        exit_record["reason"],
        exit_record["step"],
        exit_record["host"],
    ) == (
        code,
        reason,
        7,
        os.uname().nodename,
    )
    assert abs(exit_record["time"] - time.time()) < 60


def test_a_job_that_lost_its_folder_records_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunInUseError), record_exit(tmp_path):
        raise RunInUseError("taken over")
    assert read_exit_record(tmp_path) is None
