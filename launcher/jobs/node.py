"""Ranks of one host in a training on several: `nextpt train --hostfile` starts it over ssh.

The first line of standard input is a JSON object: {"action": "describe", ...} or
{"action": "start", ...}, so that no word of a config or a path goes through a shell of this host.
While ranks run, further lines are names of signals for them. The end of standard input means that
the launcher has ended: the ranks are killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

# The repository root, not this folder, must be importable: before any other import of nextpt.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

RUN = Path(__file__).resolve().parents[1] / "run.py"
END_SECONDS = 30.0  # in which the other ranks must end after one has failed

Rank = subprocess.Popen[bytes]


def describe_host(request: dict[str, Any]) -> dict[str, Any]:
    """Describe this host.

    Args:
        request: Paths that the host should see: "folder" (working folder), "mark" (a file in the
            run folder), "data" (manifest of the dataset, or None).

    Returns:
        Versions, number of GPUs, whether folder and mark exist, the SHA-256 of the manifest, and
        the address by which the launcher reached this host.
    """
    import torch

    from nextpt.base.files import sha256_file
    from nextpt.job.environment import versions

    data = request["data"]
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return {
        "versions": versions(),
        "gpus": torch.cuda.device_count(),
        "folder": os.path.isdir(request["folder"]),
        "mark": os.path.exists(request["mark"]),
        "data": sha256_file(Path(data)) if data and os.path.isfile(data) else None,
        "address": connection[2] if len(connection) == 4 else None,
    }


def start(request: dict[str, Any]) -> int:
    """Start the ranks of this host and wait for them.

    Returns:
        The exit code of the rank that ended the job here.
    """
    os.chdir(request["folder"])
    ranks = [_start_rank(request, local_rank) for local_rank in range(request["slots"])]
    threading.Thread(target=_forward_signals, args=(ranks,), daemon=True).start()
    return _wait(ranks)


def _start_rank(request: dict[str, Any], local_rank: int) -> Rank:
    environment = (
        os.environ
        | request["variables"]
        | {
            "RANK": str(request["first_rank"] + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(request["world_size"]),
            "LOCAL_SIZE": str(request["slots"]),
            "MASTER_ADDR": request["address"],
            "MASTER_PORT": str(request["port"]),
            "NEXTPT_SUPERVISOR": str(os.getpid()),
        }
    )
    command = [sys.executable, "-u", str(RUN), f"--local_rank={local_rank}", *request["arguments"]]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)


def _forward_signals(ranks: list[Rank]) -> None:
    """Send signals to the ranks until standard input ends; then kill the ranks."""
    for line in sys.stdin:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.Signals[line.strip()])
    for rank in ranks:
        rank.kill()
    os._exit(1)


def _wait(ranks: list[Rank]) -> int:
    first_code, deadline = 0, float("inf")
    while any(rank.poll() is None for rank in ranks):
        codes = [rank.returncode for rank in ranks if rank.returncode]
        if codes and not first_code:
            # Below zero: ended by a signal, and so the cause
            first_code, deadline = min(codes), time.monotonic() + END_SECONDS
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    last_codes = [rank.returncode for rank in ranks if rank.returncode]
    first_code = first_code or min(last_codes, default=0)
    return first_code if first_code >= 0 else 128 - first_code


def main() -> int:
    """Answer the request of standard input; returns the exit code."""
    request = json.loads(sys.stdin.readline())
    if request["action"] == "describe":
        print(json.dumps(describe_host(request)), flush=True)
        return 0
    return start(request)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # A thread may be reading standard input, which interpreter teardown would wait for.
    os._exit(code)
