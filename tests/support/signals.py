"""Signals of a process to itself, which a thread of `listen_for_signals` records."""

from __future__ import annotations

import os
import threading
from unittest.mock import patch

from nextpt.job.signals import StopRequest


def send_signal(number: int) -> None:
    """Send a signal to this process, and wait until `listen_for_signals` has recorded it.

    Otherwise the work goes on for as long as that thread takes to run.
    """
    recorded, record = threading.Event(), StopRequest.record

    def record_and_report(request: StopRequest, number: int) -> None:
        record(request, number)
        recorded.set()

    with patch.object(StopRequest, "record", record_and_report):
        os.kill(os.getpid(), number)
        assert recorded.wait(300), "nobody listens for signals"
