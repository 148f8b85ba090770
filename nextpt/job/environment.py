"""Environment record: hosts, devices and versions of every start, in RUN/environment.json."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from nextpt.base.errors import print_notice
from nextpt.base.files import atomic_write, canonical_json
from nextpt.base.json_files import read_json
from nextpt.base.processes import LATEST_TIME
from nextpt.config import Config
from nextpt.events import LARGEST_STEP

NAME = "environment.json"
PACKAGES = (
    "nextpt",
    "torch",
    "deepspeed",
    "triton",
    "flash-attn",
    "mosaicml-streaming",
    "pyarrow",
    "numpy",
    "tokenizers",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results depend on."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def host_and_device(device: torch.device) -> tuple[str, str]:
    """Host and device of this rank: the GPU, or the processor and its number of usable cores."""
    if device.type == "cuda":
        return platform.node(), torch.cuda.get_device_name(device)
    return platform.node(), f"{_processor()}, {len(os.sched_getaffinity(0))} cores"


def describe_start(
    config: Config, hosts_and_devices: list[tuple[str, str]], first_step: int
) -> dict[str, Any]:
    """Describe this start of a run, as environment.json and checkpoints keep it.

    Args:
        config: The run.
        hosts_and_devices: What `host_and_device` returns, of every rank.
        first_step: The first step that this start makes.
    """
    return {
        "time": time.time(),
        "first_step": first_step,
        "command": " ".join(sys.argv),
        "world_size": len(hosts_and_devices),
        "hosts": dict(Counter(host for host, _ in hosts_and_devices)),
        "devices": dict(Counter(name for _, name in hosts_and_devices)),
        "zero_stage": config.train.zero_stage,
        "system": f"{platform.system()} {platform.release()}",
        "host_memory_bytes": psutil.virtual_memory().total,
        "cuda": torch.version.cuda,
        "commit": _commit(),
        "versions": versions(),
    }


def record_start(run: Path, start: dict[str, Any]) -> None:
    """Append a start to the run's environment.json; an unreadable file is renamed, with a warning.

    Raises:
        OSError: The disk refuses.
    """
    path = run / NAME
    try:
        starts = _read(path)
    except FileNotFoundError:
        starts = []
    except (OSError, ValueError) as error:
        starts, damaged = [], path.with_name(f"{NAME}.damaged")
        os.replace(path, damaged)
        print_notice(f"warning: {path} is unreadable ({error}); renamed to {damaged.name}")
    with atomic_write(path) as file:
        file.write(canonical_json({"starts": [*starts, start]}))


def read_starts(run: Path) -> list[dict[str, Any]]:
    """Read all starts of a run, oldest first; none when the file is missing or unreadable."""
    try:
        return _read(run / NAME)
    except (OSError, ValueError):
        return []


def _read(path: Path) -> list[dict[str, Any]]:
    """Records of starts; raises OSError or ValueError where they cannot be read."""
    content = read_json(path)
    starts = content.get("starts") if isinstance(content, dict) else None
    if not isinstance(starts, list) or not all(map(_is_start, starts)):
        raise ValueError("it is no list of starts")
    return starts


def _is_start(value: Any) -> bool:
    """Whether a JSON value has what reports show of every start."""
    return (
        isinstance(value, dict)
        and type(value.get("first_step")) is int
        and 0 < value["first_step"] < LARGEST_STEP
        and type(value.get("time")) in (int, float)
        and 0 <= value["time"] < LATEST_TIME
        and type(value.get("host_memory_bytes")) is int
        and all(isinstance(value.get(key), dict) for key in ("hosts", "devices", "versions"))
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _commit() -> str | None:
    """Commit of the checkout that this code runs from, with `-dirty` where files differ."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: the folder may be inside another checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None if process.returncode == 0 else None
