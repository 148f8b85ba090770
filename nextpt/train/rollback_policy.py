"""Rollback policy: counts bad steps and says when training must return to a checkpoint."""

from __future__ import annotations

import math
from typing import Any

from nextpt.config import GuardSection
from nextpt.events import SkipEvent
from nextpt.train.spike_detector import SpikeDetector, StepVerdict

# State of a policy and its detector before the first step
EMPTY_STATE: dict[str, Any] = {
    "accepted": [[], []],
    "skipped": 0,
    "first_bad_step": 0,
    "consecutive": 0,
    "rollbacks": 0,
    "reason": "",
}
# Names in checkpoints written before 2026-12
OLD_NAMES = {"first_bad_step": "since", "consecutive": "in_row"}


class RollbackPolicy:
    """Counts bad steps on the host and decides when training returns to a checkpoint.

    The device has skipped bad steps by itself (see SpikeDetector); this class only reads what it
    decided.

    Attributes:
        skipped: Number of bad steps in the whole run, also of those before a rollback.
        first_bad_step: First step of the current run of bad steps, 0 when the last step was good.
        consecutive: Length of the current run of bad steps.
        rollbacks: Number of rollbacks since a checkpoint was saved after one.
        reason: Why the last bad step was bad; one of spike_detector.REASONS.
    """

    def __init__(self, section: GuardSection, detector: SpikeDetector) -> None:
        self.section = section
        self.detector = detector
        self.skipped = 0
        self.first_bad_step = 0
        self.consecutive = 0
        self.rollbacks = 0
        self.reason = ""

    def is_rollback_due(self) -> bool:
        """Whether too many steps in a row were bad; true until `record_rollback`."""
        return self.consecutive >= self.section.rollback_after

    @property
    def last_bad_step(self) -> int:
        """Last step of the current run of bad steps."""
        return self.first_bad_step + self.consecutive - 1

    def read_verdicts(self, step: int) -> tuple[list[StepVerdict], list[SkipEvent]]:
        """Read and count the verdicts on the steps since the last call; waits for the device.

        Steps after too many bad ones in a row are not counted: a rollback makes them again, so
        that nothing depends on how often this method is called.

        Args:
            step: Number of completed steps.

        Returns:
            The verdicts, and an event for each skipped step.
        """
        verdicts = self.detector.read()
        events: list[SkipEvent] = []
        for verdict_step, verdict in enumerate(verdicts, step - len(verdicts) + 1):
            if self.is_rollback_due():
                break
            if not verdict.reason:
                self.first_bad_step = self.consecutive = 0
                continue
            self.skipped += 1
            self.consecutive += 1
            self.first_bad_step = self.first_bad_step or verdict_step
            self.reason = verdict.reason
            events.append(
                SkipEvent(
                    step=verdict_step,
                    reason=verdict.reason,
                    loss=verdict.loss,
                    grad_norm=verdict.grad_norm,
                    consecutive=self.consecutive,
                    skipped=self.skipped,
                    loss_limit=_finite_or_none(verdict.loss_limit),
                    grad_norm_limit=_finite_or_none(verdict.grad_norm_limit),
                )
            )
        return verdicts, events

    def describe(self) -> str:
        """The current run of bad steps, for messages."""
        return (
            f"{self.consecutive} bad steps in a row, {self.first_bad_step} to {self.last_bad_step}"
            f" (the last one: {self.reason})"
        )

    def record_rollback(self, state: dict[str, Any] | None) -> None:
        """Continue from the state of the checkpoint that training returned to."""
        skipped, reason = self.skipped, self.reason
        self.load_state(state)
        self.first_bad_step = self.consecutive = 0
        self.skipped, self.reason = skipped, reason
        self.rollbacks += 1

    def reset_rollbacks(self) -> None:
        """Forget past rollbacks: training got further than the last one."""
        self.rollbacks = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of policy and detector; waits for the device."""
        return {
            "accepted": self.detector.state(),
            "skipped": self.skipped,
            "first_bad_step": self.first_bad_step,
            "consecutive": self.consecutive,
            "rollbacks": self.rollbacks,
            "reason": self.reason,
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from what `state` returned; None: from nothing.

        Raises:
            KeyError, TypeError, ValueError: When it is not such a state.
        """
        state = EMPTY_STATE if state is None else state
        state = {name: state[old] for name, old in OLD_NAMES.items() if old in state} | state
        self.detector.load_state(state["accepted"])
        self.skipped = int(state["skipped"])
        self.first_bad_step = int(state["first_bad_step"])
        self.consecutive = int(state["consecutive"])
        self.rollbacks = int(state["rollbacks"])
        self.reason = str(state["reason"])


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
