"""Config section `guard`: detection of bad steps, and rollback."""

from __future__ import annotations

from nextpt.config.section import Section, key


class GuardSection(Section):
    """Bad steps: a loss or gradient norm that is not finite, or a spike (docs/reliability.md)."""

    spike_sigma: float | None = key(
        8.0,
        gt=0,
        unit="standard deviations",
        deprecated=("spikes",),
        description=(
            "distance of a spike above the median of the last accepted steps; null: only"
            " non-finite steps are bad"
        ),
        aliases=("spike_threshold", "loss_spike_threshold", "sigma_factor", "rerun_threshold"),
    )
    window: int = key(
        128,
        ge=4,
        le=2**16,
        unit="accepted steps",
        description="steps to compare with; spikes are detected once there are this many",
    )
    rollback_after: int = key(
        8,
        ge=1,
        unit="steps",
        description=(
            "consecutive bad steps after which training rolls back to the checkpoint before them"
            " and skips their data"
        ),
    )
    max_rollbacks: int = key(
        3,
        ge=0,
        unit="rollbacks",
        description="rollbacks without further progress after which training ends with an error",
    )
