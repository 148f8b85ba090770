"""Resume with another world size, another ZeRO stage, another precision."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextpt.config import Config
from nextpt.events import read_events
from nextpt.job.environment import read_starts
from tests.support.datasets import tiny
from tests.support.ranks import run_jobs

STEPS = 50
# Kind -> how far the losses may move: an update of Muon's has full size in every direction, also in
# those in which the gradient is nearly nothing but rounding
OPTIMIZERS = {"adamw": 1e-6, "muon": 2e-5}
CHAIN = [(1, 1), (2, 3), (4, 2), (3, 3), (1, 2)]  # (ranks, ZeRO stage) of ten steps each


def job(dataset: Path, folder: Path, optimizer: str = "adamw", **train: object) -> Config:
    return tiny(
        dataset,
        folder,
        optimizer={"kind": optimizer, "lr": 3e-3},
        train={"steps": STEPS, "global_batch_size": 12, "micro_batch_size": 1} | train,
    )


def losses(run: Path) -> list[float]:
    events = read_events(run / "metrics.jsonl", "train")
    assert [event["step"] for event in events] == list(range(1, STEPS + 1))
    return [event["loss"] for event in events]


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("elastic")
    jobs = [(job(dataset, root / "bf16", precision="bf16"), 1)]
    for optimizer in OPTIMIZERS:
        jobs.append((job(dataset, root / f"unbroken-{optimizer}", optimizer), 1))
        jobs += [
            (
                job(
                    dataset,
                    root / f"chain-{optimizer}",
                    optimizer,
                    zero_stage=stage,
                    stop_at=10 * n,
                ),
                ranks,
            )
            for n, (ranks, stage) in enumerate(CHAIN, 1)
        ]
    jobs += [
        (job(dataset, root / "precisions", precision=precision, stop_at=stop), 1)
        for precision, stop in (("fp32", 15), ("bf16", 30), ("fp32", STEPS))
    ]
    run_jobs(jobs, root / "jobs")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "rel"), OPTIMIZERS.items())
def test_other_world_sizes_and_stages_follow_the_uninterrupted_curve(
    runs: Path, optimizer: str, rel: float
) -> None:
    chain = runs / f"chain-{optimizer}"
    assert [(start["world_size"], start["zero_stage"]) for start in read_starts(chain)] == CHAIN
    expected = losses(runs / f"unbroken-{optimizer}")
    assert expected[-1] < expected[0] - 0.5
    assert losses(chain) == pytest.approx(expected, rel=rel)


@pytest.mark.slow
def test_a_change_of_precision_makes_no_jump(runs: Path) -> None:
    """Its distance from the fp32 run never exceeds the largest one of a whole run in bf16.

    Losses are bit-identical before the change.
    """
    expected = losses(runs / "unbroken-adamw")
    measured = losses(runs / "precisions")
    bf16 = losses(runs / "bf16")
    bound = max(abs(a - b) for a, b in zip(expected, bf16, strict=True))
    assert measured[:15] == expected[:15] and measured[15:30] != expected[15:30]
    assert 0 < max(abs(a - b) for a, b in zip(expected, measured, strict=True)) <= bound
