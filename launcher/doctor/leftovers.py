"""Leftovers of killed processes: stale locks of compilations, unused shared memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

from launcher.doctor.finding import Finding, ok, warning
from nextpt.base.processes import mapped_files, open_files

MIN_AGE = 30.0  # seconds; a younger file may be about to be opened


def examine_leftovers() -> list[Finding]:
    """Run all checks of this module."""
    return [extension_locks(), stale_shared_memory()]


def extensions_folder() -> Path:
    """Return the folder in which torch compiles extensions.

    See torch.utils.cpp_extension.get_default_build_root.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))


def extension_locks(root: Path | None = None) -> Finding:
    """Check for locks of compilations that no process has open: a killed process left them."""
    root = root or extensions_folder()
    locks = list(root.rglob("lock")) if root.is_dir() else []
    held = set(open_files()) if locks else set()
    stale = [lock for lock in locks if str(lock.resolve()) not in held]
    if stale:
        return warning(
            "extension locks",
            f"{len(stale)} left by killed compilations: {', '.join(map(str, stale[:3]))}",
            f"rm {' '.join(map(str, stale))}: otherwise every compilation of the same extension"
            " hangs (nextpt compiles none)",
        )
    return ok(
        "extension locks", f"none stale in {root}" + (f", {len(locks)} in use" if locks else "")
    )


def stale_shared_memory() -> Finding:
    """Check for this user's files in shared memory that no process has open or mapped."""
    root = Path("/dev/shm")
    mine = (
        [f for f in root.iterdir() if f.is_file() and f.stat().st_uid == os.getuid()]
        if root.is_dir()
        else []
    )
    used = set(open_files()) | set(mapped_files()) if mine else set()
    now = time.time()
    stale = [f for f in mine if str(f) not in used and now - f.stat().st_mtime > MIN_AGE]
    if not stale:
        return ok(
            "stale shared memory",
            f"none in {root}" + (f", {len(mine)} files in use" if mine else ""),
        )
    size = sum(f.stat().st_blocks * 512 for f in stale)
    names = " ".join(f"'{f}'" for f in stale[:5]) + (" ..." if len(stale) > 5 else "")
    return warning(
        "stale shared memory",
        f"{len(stale)} files, {size / 2**20:.1f} MiB, that no process uses: {names}",
        "remove them while none of your jobs is starting: they use memory until the machine"
        " restarts",
    )
