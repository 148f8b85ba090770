"""Spike detector and rollback policy: against numpy, saved and loaded, reset, other windows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextpt.config import GuardSection
from nextpt.train.rollback_policy import EMPTY_STATE, RollbackPolicy
from nextpt.train.spike_detector import FLOORS, NORMAL, SpikeDetector

LOSSES = st.one_of(st.floats(0.0, 12.0), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
NORMS = st.one_of(st.floats(0.0, 100.0), st.sampled_from([math.nan, math.inf, -1.0, 1e30]))


def judge_all(detector: SpikeDetector, steps: list[tuple[float, float]]) -> list[bool]:
    zero = torch.zeros((), dtype=torch.float64)
    return [
        bool(detector.classify(torch.tensor(loss, dtype=torch.float64), zero, torch.tensor(norm)))
        for loss, norm in steps
    ]


def reference(section: GuardSection, steps: list[tuple[float, float]]) -> list[str]:
    """The same rule on lists, with numpy's median."""
    accepted: list[tuple[float, float]] = []
    reasons = []
    for loss, norm in steps:
        norm = float(np.float32(norm))
        values = (loss, math.log(max(norm, 1e-30)) if math.isfinite(norm) else norm)
        limits = [math.inf, math.inf]
        if section.spike_sigma and len(accepted) >= section.window:
            for row in range(2):
                last = np.array([a[row] for a in accepted[-section.window :]])
                centre = np.median(last)
                limits[row] = centre + section.spike_sigma * max(
                    NORMAL * np.median(np.abs(last - centre)), FLOORS[row]
                )
        if not math.isfinite(loss):
            reasons.append("loss not finite")
        elif not math.isfinite(norm) or norm < 0:
            reasons.append("gradient not finite")
        elif values[0] > limits[0]:
            reasons.append("loss spike")
        elif values[1] > limits[1]:
            reasons.append("gradient spike")
        else:
            reasons.append("")
            accepted.append(values)
    return reasons


@pytest.mark.thorough
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(LOSSES, NORMS), max_size=40),
    st.integers(4, 9),
    st.one_of(st.none(), st.floats(0.5, 8.0)),
)
def test_verdicts_equal_numpys_and_a_bad_step_leaves_no_trace(
    steps: list[tuple[float, float]], window: int, spikes: float | None
) -> None:
    section = GuardSection(window=window, spike_sigma=spikes)
    detector = SpikeDetector(section, torch.device("cpu"))
    bad = judge_all(detector, steps)
    verdicts = detector.read()
    assert [verdict.reason for verdict in verdicts] == reference(section, steps) and bad == [
        bool(verdict.reason) for verdict in verdicts
    ]
    good = SpikeDetector(section, torch.device("cpu"))
    judge_all(good, [step for step, skipped in zip(steps, bad, strict=True) if not skipped])
    assert detector.state() == good.state() and detector.read() == []


@pytest.mark.thorough
@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(LOSSES, NORMS), min_size=1, max_size=40), st.data())
def test_a_saved_and_loaded_policy_continues_unchanged(
    steps: list[tuple[float, float]], data: st.DataObject
) -> None:
    section = GuardSection(window=5, spike_sigma=2.0, rollback_after=3)
    cut = data.draw(st.integers(0, len(steps)))
    whole, first, second = (
        RollbackPolicy(section, SpikeDetector(section, torch.device("cpu"))) for _ in range(3)
    )
    judge_all(whole.detector, steps)
    judge_all(first.detector, steps[:cut])
    expected, begun = whole.read_verdicts(len(steps))[1], first.read_verdicts(cut)[1]
    second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    judge_all(second.detector, steps[cut:])
    resumed = begun + second.read_verdicts(len(steps))[1]
    assert second.state() == whole.state() and second.is_rollback_due() == whole.is_rollback_due()
    states = [
        [
            repr(
                (
                    e.step,
                    e.reason,
                    e.loss,
                    e.grad_norm,
                    e.consecutive,
                    e.skipped,
                    e.loss_limit,
                    e.grad_norm_limit,
                )
            )
            for e in events
        ]
        for events in (expected, resumed)
    ]
    assert states[0] == states[1]


def guard(**settings: object) -> RollbackPolicy:
    section = GuardSection(**settings)
    return RollbackPolicy(section, SpikeDetector(section, torch.device("cpu")))


def test_falling_losses_are_no_spikes_and_only_a_full_window_rejects() -> None:
    policy = guard(window=8, spike_sigma=3.0)
    falling = [(10.0 * 0.5**n, 10.0 * 0.5**n) for n in range(30)]
    assert not any(judge_all(policy.detector, falling))
    early = guard(window=8, spike_sigma=3.0)
    assert judge_all(early.detector, [(1.0, 1.0)] * 7 + [(9.0, 9.0)]) == [False] * 8
    full = guard(window=8, spike_sigma=3.0)
    assert judge_all(full.detector, [(1.0, 1.0)] * 8 + [(9.0, 1.0), (1.0, 9.0), (1.02, 1.1)]) == [
        False
    ] * 8 + [True, True, False]
    assert [(e.step, e.reason) for e in full.read_verdicts(11)[1]] == [
        (9, "loss spike"),
        (10, "gradient spike"),
    ]


def test_reset_statistics_reject_nothing() -> None:
    policy = guard(window=4, spike_sigma=3.0)
    judge_all(policy.detector, [(1.0, 1.0)] * 6)
    policy.detector.reset()
    assert (
        judge_all(policy.detector, [(9.0, 1.0)] * 5) == [False] * 5
        and policy.detector.state()[0] == [9.0] * 4
    )


def test_a_rollback_is_due_independently_of_when_verdicts_are_read() -> None:
    steps = [
        (1.0, 1.0),
        (math.nan, 1.0),
        (1.0, 1.0),
        *[(math.nan, 1.0)] * 3,
        (1.0, 1.0),
        (math.nan, 1.0),
    ]
    outcomes = []
    for every in (1, 2, 8):
        policy, events = guard(window=4, rollback_after=3), []
        for first in range(0, 8, every):
            judge_all(policy.detector, steps[first : first + every])
            events += [
                (e.step, e.consecutive, e.skipped) for e in policy.read_verdicts(first + every)[1]
            ]
        outcomes.append(
            (
                policy.is_rollback_due(),
                policy.first_bad_step,
                policy.consecutive,
                policy.skipped,
                events,
            )
        )
    assert (
        outcomes[0] == (True, 4, 3, 4, [(2, 1, 1), (4, 1, 2), (5, 2, 3), (6, 3, 4)])
        and outcomes == outcomes[:1] * 3
    )
    policy.record_rollback(EMPTY_STATE)
    assert (policy.is_rollback_due(), policy.first_bad_step, policy.skipped, policy.rollbacks) == (
        False,
        0,
        4,
        1,
    )
    policy.reset_rollbacks()
    assert policy.rollbacks == 0


@pytest.mark.parametrize("window", [4, 6, 16])
def test_statistics_load_into_another_window(window: int) -> None:
    policy = guard(window=8)
    judge_all(policy.detector, [(float(n), 1.0) for n in range(11)])
    other = guard(window=window)
    other.load_state(policy.state())
    assert other.detector.state()[0] == [float(n) for n in range(3, 11)][-window:]
    judge_all(other.detector, [(11.0, 1.0)])
    assert other.detector.state()[0] == [float(n) for n in range(3, 12)][-window:]


def test_a_state_with_the_names_before_2026_12_is_read() -> None:
    policy = guard()
    old = {"accepted": [[1.0], [0.5]], "skipped": 9, "since": 4, "in_row": 2}
    policy.load_state(old | {"rollbacks": 1, "reason": "loss spike"})
    assert (policy.first_bad_step, policy.consecutive, policy.last_bad_step) == (4, 2, 5)
    assert policy.state().keys() == EMPTY_STATE.keys()


@pytest.mark.parametrize(
    "change",
    [
        {"accepted": [[1.0], []]},
        {"accepted": [[math.nan], [1.0]]},
        {"accepted": [[1.0]]},
        {"accepted": None},
        {"consecutive": "many"},
        {"first_bad_step": None},
    ],
)
def test_a_damaged_state_is_refused(change: dict) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        guard().load_state(EMPTY_STATE | change)
