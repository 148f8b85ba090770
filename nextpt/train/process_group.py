"""Process group and device: how a rank joins the job.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from the launcher.
"""

from __future__ import annotations

import os
import socket

import psutil
import torch

from nextpt.base.errors import UserError
from nextpt.train import deepspeed_api

TIMEOUT_MINUTES = 30.0  # of a collective, and of the wait for all ranks to join


def start_distributed() -> torch.device:
    """Join the process group and return this rank's device.

    A process that was started without a launcher becomes rank 0 of 1 on a free port.

    Raises:
        UserError: The ranks cannot connect to each other.
    """
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(_free_port()),
        )
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if not cuda and "OMP_NUM_THREADS" not in os.environ:  # ranks of one machine share its cores
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1")))
        )
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    if interface := _interface_to(os.environ.get("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        deepspeed_api.init_process_group("nccl" if cuda else "gloo", TIMEOUT_MINUTES)
    except (RuntimeError, OSError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"ranks cannot meet at {address}: {_first_line(error)}; another job may use the port:"
            " give --master_port to deepspeed, or set MASTER_PORT"
        ) from error
    if cuda:
        torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def _interface_to(address: str) -> str | None:
    """Network interface by which this host reaches the first rank; None where that is unknown.

    Without it gloo takes the interface that the host's own name resolves to, which often is the
    loopback.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 1))  # sends nothing: it only asks the routing table
            own = probe.getsockname()[0]
    except OSError:
        return None
    return next(
        (
            name
            for name, addresses in psutil.net_if_addrs().items()
            if any(entry.address == own for entry in addresses)
        ),
        None,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
