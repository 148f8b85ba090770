"""Multi-token prediction on two ranks: resuming, bf16, compiled blocks, Muon, another weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import Config
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.ranks import train_all

pytestmark = pytest.mark.process

STEPS, STOP = 4, 2
MUON = {"kind": "muon", "lr": 3e-3, "muon": {"normuon_beta": 0.9}}
RUNS: dict[str, dict[str, Any]] = {
    "fp32-0": {"train": {"zero_stage": 0}},
    "fp32-3": {"train": {"zero_stage": 3}},
    "bf16-1": {"train": {"zero_stage": 1, "precision": "bf16"}},
    "bf16-3": {"train": {"zero_stage": 3, "precision": "bf16"}},
    "muon-0": {"train": {"zero_stage": 0}, "optimizer": MUON},
    "muon-2": {"train": {"zero_stage": 2}, "optimizer": MUON},
}


def job(
    dataset: Path,
    folder: Path,
    train: dict[str, Any],
    optimizer: dict[str, Any] | None = None,
    **objective: float,
) -> Config:
    return tiny(
        dataset,
        folder,
        model={"mtp_depth": 2},
        optimizer=optimizer or {},
        objective=objective,
        train={"steps": STEPS} | train,
    )


@pytest.fixture(scope="module")
def root(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mtp")
    configs = []
    for name, sections in RUNS.items():
        configs.append(job(dataset, root / name, **sections))
        for stop in (STOP, STEPS):
            part = sections | {"train": sections["train"] | {"stop_at": stop}}
            configs.append(job(dataset, root / f"{name}-resumed", **part))
    configs.append(job(dataset, root / "lighter", {"zero_stage": 0, "stop_at": STOP}))
    configs.append(job(dataset, root / "lighter", {"zero_stage": 0}, mtp_weight=0.1))
    assert train_all(configs, 2, root / "ranks") == [None] * len(configs)
    return root


def metrics(root: Path, run: str) -> dict[str, list[float]]:
    """Loss, gradient norm and the losses of both depths, by step."""
    events = read_events(root / run / "metrics.jsonl", "train")
    depths = {
        name: [event["auxiliary_losses"][name] for event in events] for name in ("mtp_1", "mtp_2")
    }
    return {key: [event[key] for event in events] for key in ("loss", "grad_norm")} | depths


def state(root: Path, run: str) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = open_checkpoint(root / run / "checkpoints")
    assert checkpoint.step == STEPS
    return {
        (name, kind): checkpoint.read_whole(name, kind)
        for name, kinds in checkpoint.state_shapes().items()
        for kind in kinds
    }


@pytest.mark.parametrize("run", RUNS)
def test_resuming_changes_no_bit(root: Path, run: str) -> None:
    assert metrics(root, f"{run}-resumed") == metrics(root, run)
    whole, resumed = state(root, run), state(root, f"{run}-resumed")
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


@pytest.mark.parametrize(
    ("run", "reference", "tolerance"),
    [
        ("fp32-3", "fp32-0", 2e-5),
        ("bf16-1", "fp32-0", 5e-3),
        ("bf16-3", "fp32-0", 5e-3),
        ("muon-2", "muon-0", 2e-5),
    ],
)
def test_stages_and_precisions_agree(
    root: Path, run: str, reference: str, tolerance: float
) -> None:
    losses, expected = metrics(root, run), metrics(root, reference)
    for name in ("loss", "mtp_1", "mtp_2"):
        assert losses[name] == pytest.approx(expected[name], rel=tolerance)


def test_muon_steps_the_matrices_of_the_modules(root: Path) -> None:
    weights = state(root, "muon-2")
    for depth in range(2):
        for matrix in ("projection", "block.attention.q_proj"):
            assert weights[f"mtp.{depth}.{matrix}.weight", "momentum"].any()
        assert weights[f"mtp.{depth}.hidden_norm.weight", "exp_avg"].any()


def test_the_weight_may_change_when_a_run_is_resumed(root: Path) -> None:
    """As in DeepSeek-V3 (arXiv 2412.19437 section 4.2): the model is the same, its pull is less."""
    whole, lighter = metrics(root, "fp32-0"), metrics(root, "lighter")
    assert lighter["loss"][:STOP] == whole["loss"][:STOP]
    # The logged loss is the objective less the modules' part
    assert lighter["loss"][STOP] == pytest.approx(whole["loss"][STOP], rel=1e-6)
    assert lighter["grad_norm"][STOP] != whole["grad_norm"][STOP]
    for name in ("mtp_1", "mtp_2"):
        assert lighter[name][:STOP] == whole[name][:STOP]
        assert lighter[name][STOP] == pytest.approx(whole[name][STOP] / 3)


@pytest.mark.slow
def test_compiled_modules_train_alike(dataset: Path, root: Path, tmp_path: Path) -> None:
    compiled = job(dataset, tmp_path / "compiled", {"zero_stage": 0, "compile": True})
    assert train_all([compiled], 2, tmp_path / "ranks") == [None]
    losses, expected = metrics(tmp_path, "compiled"), metrics(root, "fp32-0")
    for name in ("loss", "mtp_1", "mtp_2"):
        assert losses[name] == pytest.approx(expected[name], rel=1e-4)
