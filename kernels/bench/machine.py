"""Machine of a benchmark: its name, its clock, its memory, and files of results."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton


def describe_machine(device: str) -> dict[str, str]:
    """Return the device and the versions, for the head of every table."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = (
            f"{model.group(1) if model else platform.machine()}, {os.cpu_count()} cores,"
            f" {torch.get_num_threads()} threads"
        )
    return {
        "device": name,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def synchronize(device: str) -> None:
    """Wait until a CUDA device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_in_turn(
    jobs: Mapping[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, float]:
    """Return the median seconds of each job.

    In every round all run one after another, so that clocks and neighbours are the same.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            synchronize(device)
            start = time.perf_counter()
            job()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write the content as JSON, with its folders, unless the path is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


def measure_peak(device: str, job: Callable[[], None]) -> int:
    """Return the bytes above those before, at the highest point of `job`."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (proc(5))
    before = _status("VmRSS")
    job()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if line is None:
        raise RuntimeError(f"/proc/self/status has no {key}")
    return 1024 * int(line.group(1))
