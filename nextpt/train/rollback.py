"""Rollback policy: counts bad steps and says when training must return to a checkpoint."""

from __future__ import annotations

import math
from typing import Any

from nextpt.config import GuardSection
from nextpt.events import SkipEvent
from nextpt.train.spike_detector import SpikeDetector, StepVerdict

# The state of a policy that has seen no step.
EMPTY_STATE = {
    "accepted": [[], []],
    "skipped": 0,
    "since": 0,
    "in_row": 0,
    "rollbacks": 0,
    "reason": "",
}


class RollbackPolicy:
    """The host's part: counts bad steps and says when training must go back.

    skipped: bad steps so far, abandoned ones too. since, in_row: the first of the run of bad steps,
    and how many they are; 0 and 0 when the last step was good. rollbacks: how often training went
    back since it got any further.
    """

    def __init__(self, section: GuardSection, detector: SpikeDetector) -> None:
        self.section, self.detector = section, detector
        self.skipped = self.since = self.in_row = self.rollbacks = 0
        self.reason = ""  # of the last bad step

    @property
    def tripped(self) -> bool:
        """Whether there were too many bad steps in a row; remains true until training went back."""
        return self.in_row >= self.section.rollback_after

    def hear(self, step: int) -> tuple[list[StepVerdict], list[SkipEvent]]:
        """Judgements of the steps up to `step` since the last call, and those skipped as events.

        Waits for the device.

        What came after too many in a row will be made again and is passed over, so that nothing
        depends on when one looks.
        """
        judged, events = self.detector.read(), []
        for at, one in enumerate(judged, step - len(judged) + 1):
            if self.tripped:
                break
            if not one.reason:
                self.since = self.in_row = 0
                continue
            self.skipped, self.in_row, self.since, self.reason = (
                self.skipped + 1,
                self.in_row + 1,
                self.since or at,
                one.reason,
            )
            limits = {
                name: value if math.isfinite(value) else None
                for name, value in (
                    ("loss_limit", one.loss_limit),
                    ("grad_norm_limit", one.norm_limit),
                )
            }
            events.append(
                SkipEvent(
                    at, one.reason, one.loss, one.grad_norm, self.in_row, self.skipped, **limits
                )
            )
        return judged, events

    def seen(self) -> str:
        """The run of bad steps, for a person."""
        return (
            f"{self.in_row} bad steps in a row, {self.since} to {self.since + self.in_row - 1} (the"
            f" last one: {self.reason})"
        )

    def record_rollback(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state after a rollback to it.

        `tripped` is false from here on.
        """
        skipped, reason = self.skipped, self.reason
        self.load(state)
        self.skipped, self.reason, self.since, self.in_row, self.rollbacks = (
            skipped,
            reason,
            0,
            0,
            self.rollbacks + 1,
        )

    def reset_rollbacks(self) -> None:
        """Hear that a later checkpoint than that of the last rollback is made."""
        self.rollbacks = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; waits for the device."""
        return {
            "accepted": self.detector.state(),
            "skipped": self.skipped,
            "since": self.since,
            "in_row": self.in_row,
            "rollbacks": self.rollbacks,
            "reason": self.reason,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError where it is not what `state` gave."""
        self.detector.load(state["accepted"])
        self.skipped, self.since, self.in_row, self.rollbacks = (
            int(state[k]) for k in ("skipped", "since", "in_row", "rollbacks")
        )
        self.reason = str(state["reason"])
