"""TCP ports for ranks and servers of tests that begin to listen seconds later."""

from __future__ import annotations

import itertools
import os
import socket

# A range of each process of pytest-xdist: not one of the ports that the system gives out, nor of
# those that `nextpt train` draws, and that a job of Slurm has
FIRST, COUNT, PROCESSES = 12_000, 500, 8
_number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % PROCESSES
_offsets = itertools.count(os.getpid())


def free_port() -> int:
    """A port without a listener, that no other test takes until it is listened to."""
    for _ in range(COUNT):
        port = FIRST + _number * COUNT + next(_offsets) % COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port among {COUNT} from {FIRST + _number * COUNT} on")
