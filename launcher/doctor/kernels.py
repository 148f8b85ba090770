"""The last choices of attention and loss that jobs of this user made by trials."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.doctor.finding import Finding, note, ok
from nextpt.job.kernel_cache import cache_file, read_entries


def examine_kernels(path: Path | None = None) -> list[Finding]:
    """Describe the newest trials of each operator; nothing without any.

    Args:
        path: File of trials; the user's if None.
    """
    path = path or cache_file()
    try:
        newest = {entry["operator"]: entry for entry in read_entries(path).values()}
        return [_describe(operator, entry) for operator, entry in newest.items()]
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return [note("kernels", f"the trials kept in {path} are unreadable")]


def _describe(operator: str, entry: dict[str, Any]) -> Finding:
    times = {t["name"]: t["milliseconds"] for t in entry["trials"] if t["reason"] is None}
    when = datetime.fromtimestamp(entry["time"]).strftime("%Y-%m-%d %H:%M")
    where = f"on {entry['device']}, {when}"
    failed = ", ".join(f"{t['name']}: {t['reason']}" for t in entry["trials"] if t["reason"])
    if not times:
        return note(
            operator, f"no trial succeeded {where}: {failed}", "nextpt kernels --config FILE"
        )
    order = sorted(times, key=times.__getitem__)
    observed = ", ".join(f"{name} {times[name]:.3g} ms" for name in order)
    return ok(operator, f"{observed}{'; ' + failed if failed else ''} ({where})")
