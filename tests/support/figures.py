"""Shared parts of failure measurements: quantiles, and a description of the machine."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from kernels.bench.machine import describe_machine
from nextpt.job.environment import versions


def quantiles(values: Iterable[float]) -> dict[str, float] | None:
    """Return p50, p95, max, mean and number of the values; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    at = lambda share: ordered[min(int(share * len(ordered)), len(ordered) - 1)]  # noqa: E731
    return {
        "n": len(ordered),
        "p50": round(at(0.5), 4),
        "p95": round(at(0.95), 4),
        "max": round(ordered[-1], 4),
        "mean": round(statistics.fmean(ordered), 4),
    }


def machine() -> dict[str, str]:
    """Processor and versions."""
    return describe_machine("cpu") | {
        name: version for name, version in versions().items() if name in ("deepspeed", "nextpt")
    }
