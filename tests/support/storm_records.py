"""Cases, runs and kills of a storm (storm.py), and leftovers that no run may have."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextpt.base.processes import command_line
from nextpt.checkpoint.folders import REMOVING, STAGING
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.events import read_events
from tests.support.figures import quantiles

STEPS, INTERVAL = 24, 3  # of a run; between saves
# Seconds that are given to ranks which had not met to notice that one died: they need not
UNMET_SECONDS = 5.0
# Seconds in which what must happen happens on any machine; how long it takes is reported
PATIENCE = 300.0
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000  # of linux/sched.h, linux/mount.h


class StormError(AssertionError):
    """The storm found something broken."""


@dataclass(frozen=True)
class Case:
    stage: int
    precision: str
    ranks: int
    asynchronous: bool

    @property
    def most_redone(self) -> int:
        return INTERVAL * (2 if self.asynchronous else 1)

    def __str__(self) -> str:
        saves = "background" if self.asynchronous else "plain"
        return f"zero-{self.stage}-{self.precision}-{self.ranks}-{saves}"


CASES = [
    Case(stage, precision, ranks, (stage + (precision == "bf16") + ranks) % 2 == 0)
    for ranks in (2, 1)
    for precision in ("fp32", "bf16")
    for stage in (0, 1, 2, 3)
    if stage or precision == "fp32"
]


@dataclass
class Reference:
    """Result of an unbroken run. seconds: Its duration; saves: Durations of its saves."""

    losses: dict[int, float]
    digest: str
    seconds: float
    saves: list[float]


@dataclass
class Kill:
    """A kill.

    Attributes:
        victims: "all", "one" or the launcher's name.
        inside: Whether it hit a save.
        detected: Seconds until the others noticed or had ended.
        redone: Steps that the next start repeated.
        recovered: Seconds from the kill to the first step of the next start that trained.
    """

    case: str
    stage: int
    victims: str
    aimed: str
    asynchronous: bool
    inside: bool
    training: bool
    at: float
    detected: float | None = None
    redone: int | None = None
    recovered: float | None = None


@dataclass
class Run:
    """A run folder between two starts.

    Attributes:
        acknowledged: The last published step.
        last_step: The last logged step.
        pending: Kills that no start has followed yet.
    """

    case: Case
    folder: Path
    config: Path
    acknowledged: int = 0
    last_step: int = 0
    starts: int = 0
    pending: list[Kill] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss; a step that was logged twice is an error."""
    events = read_events(folder / "metrics.jsonl", "train")
    values = {event["step"]: event["loss"] for event in events}
    assert len(values) == len(events), f"{folder}: a step was logged twice"
    return values


def digest(folder: Path) -> str:
    """SHA-256 over all weights and moments of the newest checkpoint."""
    checkpoint, total = open_checkpoint(folder / "checkpoints"), hashlib.sha256()
    assert checkpoint.step == STEPS, checkpoint.folder
    for name, kinds in sorted(checkpoint.state_shapes().items()):
        for kind in kinds:
            total.update(f"{name} {kind}".encode())
            total.update(checkpoint.read_whole(name, kind).numpy().tobytes())
    return total.hexdigest()


def leftovers(folder: Path) -> dict[str, list[str]]:
    """Leftovers that no finished run may have."""
    names = [path.name for path in folder.rglob("*")]
    locks = sorted(folder.glob("lock-*.json"))
    return {
        "staging folders": [n for n in names if n.startswith((STAGING, REMOVING))],
        "temporary files": [n for n in names if ".tmp" in n],
        "held locks": (
            [p.name for p in locks if json.loads(p.read_text())["held"]]
            + [p.name for p in locks[1:]]
        ),
    }


def others_noticed(job: Any, output: Callable[[], str], must: Callable[[], bool]) -> bool:
    """Whether the other ranks end, or report a lost rank.

    Within PATIENCE where `must` says that they have to, otherwise within UNMET_SECONDS.
    """
    began = time.monotonic()
    while time.monotonic() - began < (PATIENCE if must() else UNMET_SECONDS):
        if job.wait(0.005) or "lost another rank" in output():
            return True
    return False


def own_shared_memory() -> bool:
    """Give this process and its children an empty /dev/shm, so that only their files count."""
    libc = ctypes.CDLL(None, use_errno=True)
    return (
        sys.platform == "linux"
        and libc.unshare(CLONE_NEWNS) == 0
        and libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        and libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"mode=1777") == 0
    )


def working_on(config: Path) -> list[int]:
    """Processes of this machine that deepspeed's launcher started, or is, for a config."""
    processes = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        command = command_line(int(name))
        if str(config) in command and "launcher/run.py" in command:
            processes.append(int(name))
    return sorted(processes)


def summary(kills: list[Kill]) -> dict[str, Any]:
    """Figures over all kills.

    Seconds of detection: of kills of one rank in training, and of launchers.
    """
    single = [k for k in kills if k.victims == "one"]
    above = [k for k in kills if k.victims not in ("one", "all")]
    return {
        "kills": len(kills),
        "inside_saves": sum(k.inside for k in kills),
        "inside_background_saves": sum(k.inside and k.asynchronous for k in kills),
        "at_start_up": sum(not k.training for k in kills),
        "by_victims": dict(Counter(k.victims for k in kills)),
        "by_stage": dict(sorted(Counter(k.stage for k in kills).items())),
        "acknowledged_steps_lost": 0,
        "steps_redone": {
            "plain saves": quantiles(
                k.redone for k in kills if k.redone is not None and not k.asynchronous
            ),
            "background saves": quantiles(
                k.redone for k in kills if k.redone is not None and k.asynchronous
            ),
        },
        "seconds_to_the_next_step": quantiles(
            k.recovered for k in kills if k.recovered is not None
        ),
        "seconds_till_the_other_ranks_noticed": quantiles(
            k.detected for k in single if k.training and k.detected is not None
        ),
        "killed_before_ranks_had_met": sum(k.detected is None for k in single),
        "seconds_till_ranks_ended_without_launcher": quantiles(k.detected for k in above),
    }
