"""What runs on each host of a training on several: `nextpt train --hostfile` starts it over ssh.

The first line of standard input is a JSON object: {"action": "look", ...} or {"action": "start",
...}. So no word of a config or a path goes through a shell of this host. While ranks run, further
lines are names of signals for them. The end of standard input means that the one who started this
is gone: the ranks are killed.
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

# The repository root, not this folder, must be importable; must come before every other import of
# ours.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

RUN = Path(__file__).resolve().parents[1] / "run.py"
OTHERS_HAVE = 30.0  # seconds for the other ranks to end by themselves when one did


def look(request: dict[str, Any]) -> dict[str, Any]:
    """What this host has. folder, mark, data of the request: paths that it should see. address: where the one that asks reached it."""
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

    Returns the exit code of the one that ended the job here.
    """
    os.chdir(request["folder"])
    ranks = []
    for local in range(request["slots"]):
        environment = (
            os.environ
            | request["variables"]
            | {
                "RANK": str(request["first_rank"] + local),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(request["world_size"]),
                "LOCAL_SIZE": str(request["slots"]),
                "MASTER_ADDR": request["address"],
                "MASTER_PORT": str(request["port"]),
            }
        )
        command = [sys.executable, "-u", str(RUN), f"--local_rank={local}", *request["arguments"]]
        ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
    threading.Thread(target=_listen, args=(ranks,), daemon=True).start()
    return _wait(ranks)


def _listen(ranks: list[subprocess.Popen]) -> None:
    """Pass signals on until standard input ends; then nobody waits for these ranks any more."""
    for line in sys.stdin:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.Signals[line.strip()])
    for rank in ranks:
        rank.kill()
    os._exit(1)


def _wait(ranks: list[subprocess.Popen]) -> int:
    first, deadline = 0, float("inf")
    while any(rank.poll() is None for rank in ranks):
        codes = [rank.returncode for rank in ranks if rank.returncode]
        if codes and not first:
            # Below zero: ended by a signal, and so the cause
            first, deadline = min(codes), time.monotonic() + OTHERS_HAVE
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    first = first or min((rank.returncode for rank in ranks if rank.returncode), default=0)
    return first if first >= 0 else 128 - first


def main() -> int:
    request = json.loads(sys.stdin.readline())
    if request["action"] == "look":
        print(json.dumps(look(request)), flush=True)
        return 0
    return start(request)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # A thread may be reading standard input, which interpreter teardown would wait for
    os._exit(code)
