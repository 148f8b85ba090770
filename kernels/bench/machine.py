"""What a benchmark needs to know of the machine: its name, its clock, its memory."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch
import triton


def describe_machine(device: str) -> dict[str, str]:
    """Device and versions, for the head of every table."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = f"{model.group(1) if model else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {"device": name, "Python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_peak(device: str, job: Callable[[], None]) -> int:
    """Bytes above what was there before, at the highest point of `job`."""
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
    return 1024 * int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1))
