"""What killed processes leave: locks on which others wait for ever, and shared memory that nobody frees."""

from __future__ import annotations

import os
import time
from pathlib import Path

from launcher.doctor.finding import Finding, ok, warning
from nextpt.base.processes import mapped_files, open_files

YOUNG = 30.0  # seconds: a file that someone may be about to open


def examine_leftovers() -> list[Finding]:
    return [extension_locks(), stale_shared_memory()]


def extensions_folder() -> Path:
    """Where torch compiles extensions (torch.utils.cpp_extension.get_default_build_root)."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))


def extension_locks(root: Path | None = None) -> Finding:
    """A compilation holds an open file named `lock`.

    One that nobody has open was left by a killed process.
    """
    root = root or extensions_folder()
    locks = list(root.rglob("lock")) if root.is_dir() else []
    held = set(open_files()) if locks else set()
    stale = [lock for lock in locks if str(lock.resolve()) not in held]
    if stale:
        return warning(
            "extension locks",
            f"{len(stale)} left by killed compilations: {', '.join(map(str, stale[:3]))}",
            f"rm {' '.join(map(str, stale))}: whatever compiles the same extension waits for ever"
            " otherwise (nextpt compiles none)",
        )
    return ok(
        "extension locks", f"none stale in {root}" + (f", {len(locks)} in use" if locks else "")
    )


def stale_shared_memory(root: Path = Path("/dev/shm")) -> Finding:
    """This user's files in shared memory that no process has open or mapped."""
    mine = (
        [f for f in root.iterdir() if f.is_file() and f.stat().st_uid == os.getuid()]
        if root.is_dir()
        else []
    )
    used = set(open_files()) | set(mapped_files()) if mine else set()
    now = time.time()
    stale = [f for f in mine if str(f) not in used and now - f.stat().st_mtime > YOUNG]
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
        "remove them when no job of yours starts at this moment: they hold memory until the machine"
        " restarts",
    )
