"""Where and with what a run was started: RUN/environment.json, one record per start."""

from __future__ import annotations

import json
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

from nextpt.base.files import atomic_write, canonical_json
from nextpt.config import Config

PACKAGES = (
    "nextpt",
    "torch",
    "deepspeed",
    "triton",
    "mosaicml-streaming",
    "pyarrow",
    "numpy",
    "tokenizers",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on.

    Those not installed are left out.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def place(device: torch.device) -> tuple[str, str]:
    """(host, device) of this rank: the GPU's name, or the processor's and how many of its cores may be used."""
    if device.type == "cuda":
        return platform.node(), torch.cuda.get_device_name(device)
    return platform.node(), f"{_processor()}, {len(os.sched_getaffinity(0))} cores"


def describe_start(
    config: Config, places: list[tuple[str, str]], first_step: int
) -> dict[str, Any]:
    """What is true of this start. places: (host, device) of every rank, as `place` tells them."""
    return {
        "time": time.time(),
        "first_step": first_step,
        "command": " ".join(sys.argv),
        "world_size": len(places),
        "hosts": dict(Counter(host for host, _ in places)),
        "devices": dict(Counter(name for _, name in places)),
        "zero_stage": config.train.zero_stage,
        "system": f"{platform.system()} {platform.release()}",
        "host_memory_bytes": psutil.virtual_memory().total,
        "cuda": torch.version.cuda,
        "commit": _commit(),
        "versions": versions(),
    }


def record_start(run: Path, start: dict[str, Any]) -> None:
    """Add a start to the run's environment.json."""
    with atomic_write(run / "environment.json") as file:
        file.write(canonical_json({"starts": [*read_starts(run), start]}))


def read_starts(run: Path) -> list[dict[str, Any]]:
    """All starts of a run, oldest first; none when the file is missing or not ours."""
    try:
        starts = json.loads((run / "environment.json").read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return starts if isinstance(starts, list) else []


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
    """Commit of the checkout this code runs from, `-dirty` where files differ.

    None outside a checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed; the folder may lie in somebody else's checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
