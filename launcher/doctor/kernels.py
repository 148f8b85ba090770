"""The last choice of attention that jobs of this user made by trials."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.doctor.finding import Finding, note, ok
from nextpt.job.kernel_cache import cache_file, read_entries


def examine_kernels(path: Path | None = None) -> list[Finding]:
    """Describe the newest trials; nothing without any.

    Args:
        path: File of trials; the user's if None.
    """
    entries = [*read_entries(path or cache_file()).values()]
    try:
        return [_describe(entries[-1])] if entries else []
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return [note("attention", f"the trials kept in {path or cache_file()} are unreadable")]


def _describe(entry: dict[str, Any]) -> Finding:
    times = {t["name"]: t["milliseconds"] for t in entry["trials"] if t["reason"] is None}
    when = datetime.fromtimestamp(entry["time"]).strftime("%Y-%m-%d %H:%M")
    where = f"on {entry['device']}, {when}"
    failed = ", ".join(f"{t['name']}: {t['reason']}" for t in entry["trials"] if t["reason"])
    if not times:
        return note("attention", f"no trial succeeded {where}: {failed}", "nextpt kernels --help")
    order = sorted(times, key=times.__getitem__)
    observed = ", ".join(f"{name} {times[name]:.3g} ms" for name in order)
    return ok("attention", f"{observed}{'; ' + failed if failed else ''} ({where})")
