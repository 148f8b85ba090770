"""A batch that changes in the run: every stage, resuming in the ramp, other numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import Config
from nextpt.events import read_events
from nextpt.observe.run_record import read_runs
from tests.support.datasets import tiny
from tests.support.ranks import train_all

pytestmark = pytest.mark.process

STAGES = range(4)
# Micro-batches of 2 ranks: 3, 6, 3. At DeepSpeed's own count the first step of 6 would end after 3
RAMP = [
    {"after_steps": 3, "global_batch_size": 12},
    {"after_tokens": (3 * 6 + 2 * 12) * 64, "global_batch_size": 6},
]
BATCHES = [6, 6, 6, 12, 12, 6, 6]
STOPS = [2, 3, 4, 7]  # before, at and after the first change, and the end
# One of them for each stage; all of them at every stage in the slow tests
SHORT_STOPS = {0: [4, 7], 1: [3, 7], 2: [2, 7], 3: [3, 7]}
GROWTH = {"max_batch_size": 24, "noise_ratio": 1e-9, "measured_steps": 2}


def ramp(dataset: Path, folder: Path, **train: Any) -> Config:
    batches = {"global_batch_size": 6, "micro_batch_size": 1, "batch_schedule": RAMP}
    length = {"steps": None, "tokens": sum(BATCHES) * 64}
    return tiny(
        dataset,
        folder,
        schedule={"kind": "linear", "unit": "tokens", "warmup": 500, "batch_scaling": "sqrt"},
        train=batches | length | train,
    )


def growth(
    dataset: Path, folder: Path, schedule: dict[str, Any] | None = None, **train: Any
) -> Config:
    return tiny(
        dataset,
        folder,
        schedule={"unit": "tokens", "warmup": 500} | (schedule or {}),
        train={
            "steps": None,
            "tokens": 100 * 64,
            "global_batch_size": 6,
            "micro_batch_size": 1,
            "batch_growth": GROWTH,
        }
        | train,
        checkpoint={"every_steps": 2, "keep_last": None},
    )


@pytest.fixture(scope="module")
def root(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ramp")
    configs = []
    for stage in STAGES:
        configs.append(ramp(dataset, root / f"whole-{stage}", zero_stage=stage))
        configs += [
            ramp(dataset, root / f"parts-{stage}", zero_stage=stage, stop_at=stop)
            for stop in SHORT_STOPS[stage]
        ]
    configs.append(ramp(dataset, root / "bf16", precision="bf16"))
    configs.append(growth(dataset, root / "growth"))
    configs += [growth(dataset, root / "growth-parts", stop_at=stop) for stop in (3, 4, 5, None)]
    stable = {"run": str(root / "growth"), "at_step": 6}
    decay = {"decay": 36 * 64}
    configs.append(growth(dataset, root / "decay", decay, tokens=None, decay_from=stable))
    configs.append(ramp(dataset, root / "elastic", zero_stage=2, stop_at=2))
    assert train_all(configs, 2, root / "two") == [None] * len(configs)
    for ranks, stage, stop in ((3, 3, 4), (1, 0, 6), (3, 1, 7)):
        part = ramp(dataset, root / "elastic", zero_stage=stage, stop_at=stop)
        assert train_all([part], ranks, root / f"ranks-{ranks}-{stage}") == [None]
    return root


@pytest.fixture(scope="module")
def stopped(dataset: Path, root: Path) -> Path:
    """The folder with runs of every stage that were stopped at all of STOPS."""
    configs = [
        ramp(dataset, root / f"all-parts-{stage}", zero_stage=stage, stop_at=stop)
        for stage in STAGES
        for stop in STOPS
    ]
    assert train_all(configs, 2, root / "all") == [None] * len(configs)
    return root


def events(root: Path, run: str) -> list[dict[str, Any]]:
    return read_events(root / run / "metrics.jsonl", "train")


def column(root: Path, run: str, key: str) -> list[Any]:
    return [event[key] for event in events(root, run)]


def state(root: Path, run: str) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = open_checkpoint(root / run / "checkpoints")
    return {
        (name, kind): checkpoint.read_whole(name, kind)
        for name, kinds in checkpoint.state_shapes().items()
        for kind in kinds
    }


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_has_its_own_batch(root: Path, stage: int) -> None:
    run = f"whole-{stage}"
    assert column(root, run, "batch_size") == BATCHES
    assert column(root, run, "tokens") == [64 * sum(BATCHES[: n + 1]) for n in range(len(BATCHES))]
    end = (sum(BATCHES) + BATCHES[-1]) * 64  # zero is reached one step after the last
    shares = [t / 500 if t < 500 else (end - t) / (end - 500) for t in column(root, run, "tokens")]
    rates = [3e-3 * (b / 6) ** 0.5 * share for b, share in zip(BATCHES, shares, strict=True)]
    assert column(root, run, "lr") == pytest.approx(rates) and 0 < rates[-1] < rates[-2]
    assert column(root, run, "loss") == pytest.approx(column(root, "whole-0", "loss"), rel=1e-4)
    checkpoint = open_checkpoint(root / run / "checkpoints")
    assert checkpoint.state["scalars"]["optimizer_updates"] == len(BATCHES)
    assert checkpoint.state["data"]["position"] == sum(BATCHES)


@pytest.mark.parametrize("run", [*(f"parts-{stage}" for stage in STAGES), "growth-parts"])
def test_resuming_inside_a_ramp_changes_no_bit(root: Path, run: str) -> None:
    assert_equal_runs(root, run, run.replace("parts", "whole").replace("growth-whole", "growth"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_resuming_at_every_place_of_a_ramp_changes_no_bit(stopped: Path, stage: int) -> None:
    assert_equal_runs(stopped, f"all-parts-{stage}", f"whole-{stage}")


def assert_equal_runs(root: Path, run: str, whole: str) -> None:
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert column(root, run, key) == column(root, whole, key)
    expected, resumed = state(root, whole), state(root, run)
    assert expected.keys() == resumed.keys()
    assert [key for key in expected if not torch.equal(expected[key], resumed[key])] == []


def test_bf16_follows_fp32(root: Path) -> None:
    assert column(root, "bf16", "loss") == pytest.approx(column(root, "whole-1", "loss"), rel=0.02)


def test_other_ranks_read_the_same_sequences(root: Path) -> None:
    """1 and 3 ranks in the midst of the ramp, at other stages: sums differ in their order only."""
    assert column(root, "elastic", "batch_size") == BATCHES
    expected = column(root, "whole-2", "loss")
    assert column(root, "elastic", "loss") == pytest.approx(expected, rel=1e-5)


def test_the_batch_follows_the_noise(root: Path) -> None:
    """Estimates of steps 1-2 and 3-4 are above the batch, so that step 5 has another one."""
    changes = read_events(root / "growth" / "metrics.jsonl", "batch")
    assert [(event["step"], event["batch_size"]) for event in changes] == [(4, 12), (8, 24)]
    assert column(root, "growth", "batch_size")[:10] == [6] * 4 + [12] * 4 + [24] * 2
    assert sum(column(root, "growth", "batch_size")) == events(root, "growth")[-1]["tokens"] // 64
    assert 100 <= events(root, "growth")[-1]["tokens"] // 64 < 124
    [record] = read_runs([root / "growth"])
    assert record.status == "complete"
    assert record.batch_tokens() == [64 * size for size in column(root, "growth", "batch_size")]


def test_a_decay_has_the_batches_that_its_stable_run_decided(root: Path) -> None:
    changes = read_events(root / "decay" / "metrics.jsonl", "batch")
    inherited, *own = [(e["step"], e["batch_size"], e["noise_scale"]) for e in changes]
    assert inherited == (4, 12, None)
    assert [change[:2] for change in own] == [(8, 24)] and own[0][2] is not None
    sizes = column(root, "decay", "batch_size")
    assert column(root, "decay", "step") == [7, 8, 9] and sizes == [12, 12, 24]
    [record] = read_runs([root / "decay"])
    assert record.status == "complete"
    assert record.batch_tokens() == [64 * size for size in sizes]
    consumed = [record.batches.consumed_tokens(step) for step in (7, 8, 9)]
    assert consumed == column(root, "decay", "tokens")
