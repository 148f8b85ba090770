"""Averages of the weights: every ZeRO stage, resuming, other ranks, a bad step, means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import CheckpointError
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import Config, to_yaml
from nextpt.evaluate.loaded_model import open_model, open_run
from nextpt.exchange import checkpoints_to_average, export_hf, load_hf, write_average
from tests.support.datasets import tiny
from tests.support.ranks import run_ranks, train_all

pytestmark = pytest.mark.process

STAGES = range(4)
STEPS = 6
DECAYS = [0.5, 0.9]


def job(dataset: Path, folder: Path, **train: Any) -> Config:
    """A checkpoint of every step, all of them kept."""
    return tiny(
        dataset,
        folder,
        train={"global_batch_size": 6, "micro_batch_size": 1, "ema": DECAYS} | train,
        checkpoint={"every_steps": 1, "keep_last": None},
    )


@pytest.fixture(scope="module")
def root(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("averages")
    configs = [job(dataset, root / f"stage-{stage}", zero_stage=stage) for stage in STAGES]
    configs.append(job(dataset, root / "bf16", precision="bf16", zero_stage=2))
    configs += [job(dataset, root / "parts", zero_stage=2, stop_at=stop) for stop in (2, STEPS)]
    configs.append(job(dataset, root / "later", ema=None, stop_at=3))
    configs.append(job(dataset, root / "later", ema=0.9, stop_at=5))
    configs.append(job(dataset, root / "later", ema=None))
    configs.append(job(dataset, root / "elastic", zero_stage=3, stop_at=2))
    assert train_all(configs, 2, root / "two") == [None] * len(configs)
    for ranks, stage, stop in ((3, 1, 4), (1, 0, STEPS)):
        part = job(dataset, root / "elastic", zero_stage=stage, stop_at=stop)
        assert train_all([part], ranks, root / f"ranks-{ranks}") == [None]
    return root


def checkpoints(root: Path, run: str) -> list[Checkpoint]:
    return [open_checkpoint(root / run / "checkpoints", step) for step in range(1, STEPS + 1)]


def expected_average(weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    """The average without a share of the initial weights, from the weights after each step."""
    average = torch.zeros_like(weights[0])
    for number, weight in enumerate(weights, 1):
        share = (1 - decay) / (1 - decay ** torch.tensor(float(number), dtype=torch.float64))
        average = average + (weight - average) * share.float()
    return average


@pytest.mark.parametrize(
    "run", [*(f"stage-{stage}" for stage in STAGES), "bf16", "parts", "elastic"]
)
def test_an_average_follows_the_weights_of_every_step(root: Path, run: str) -> None:
    saved = checkpoints(root, run)
    for name in saved[-1].shapes():
        weights = [checkpoint.read_whole(name) for checkpoint in saved]
        assert not torch.equal(weights[0], weights[-1])
        for decay in DECAYS:
            average = saved[-1].read_whole(name, f"ema-{decay}")
            assert torch.equal(average, expected_average(weights, decay)), (name, decay)
            # The definition: weights of the past by powers of the decay, which sum to 1
            shares = decay ** torch.arange(STEPS - 1, -1, -1, dtype=torch.float64)
            direct = torch.tensordot(shares / shares.sum(), torch.stack(weights).double(), dims=1)
            torch.testing.assert_close(average, direct.float())


def test_resuming_changes_no_bit(root: Path) -> None:
    whole, parts = (checkpoints(root, run)[-1] for run in ("stage-2", "parts"))
    for name, kinds in whole.state_shapes().items():
        assert {f"ema-{decay}" for decay in DECAYS} < set(kinds)
        for kind in kinds:
            assert torch.equal(whole.read_whole(name, kind), parts.read_whole(name, kind))


def test_averages_may_begin_and_end_in_the_run(root: Path) -> None:
    saved = checkpoints(root, "later")
    assert ["ema-0.9" in c.state["scalars"] for c in saved] == [False] * 3 + [True] * 2 + [False]
    for name in saved[0].shapes():
        weights = [checkpoint.read_whole(name) for checkpoint in saved[3:5]]
        average = saved[4].read_whole(name, "ema-0.9")
        assert torch.equal(average, expected_average(weights, 0.9))


def test_a_bad_step_moves_nothing(dataset: Path, tmp_path: Path) -> None:
    jobs = []
    for stage in STAGES:
        config = tiny(
            dataset,
            tmp_path / "bad",
            model={"vocab_size": 64, "heads": 2, "kv_heads": 1},
            data={"sequence_length": 16},
            optimizer={"lr": 3e-3},
            train={"micro_batch_size": 2, "global_batch_size": 16, "ema": 0.9, "zero_stage": stage},
        )
        path = tmp_path / f"{stage}.yaml"
        path.write_text(to_yaml(config))
        jobs.append({"bad step": str(path)})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    module = "tests.support.sign_momentum"
    arguments = ["-m", module, str(tmp_path / "jobs.json"), str(tmp_path / "out.json")]
    run_ranks(arguments, 2, tmp_path)
    for result in json.loads((tmp_path / "out.json").read_text()):
        assert [bool(reason) for reason in result["reasons"]] == [False, True, False]
        for good, bad, next_good in result["digests"]:
            assert good == bad != next_good


def test_models_are_opened_and_exported_with_an_average(root: Path, tmp_path: Path) -> None:
    run = root / "stage-1"
    newest = checkpoints(root, "stage-1")[-1]
    model = open_model(run, weights="ema-0.9").decoder
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, newest.read_whole(name, "ema-0.9"))
    export_hf(open_run(run, weights="ema-0.9"), run / "tokenizer.json", tmp_path / "hf")
    exported = dict(load_hf(tmp_path / "hf").named_parameters())
    assert all(torch.equal(p, exported[name]) for name, p in model.named_parameters())
    with pytest.raises(CheckpointError, match=r"no weights 'ema-0.7'; it has weight, ema-0.5, ema"):
        open_model(run, weights="ema-0.7")
    with pytest.raises(CheckpointError, match="leave --weights out"):
        open_model(tmp_path / "hf", weights="ema-0.9")


@pytest.mark.parametrize("weights", ["weight", "ema-0.5"])
def test_a_mean_of_checkpoints_is_a_model(root: Path, tmp_path: Path, weights: str) -> None:
    run = root / "stage-3"
    chosen = checkpoints_to_average(run, 3, None)
    assert chosen == checkpoints_to_average(run, None, (4, 9)) and list(chosen) == [4, 5, 6]
    write_average(run, chosen, weights, tmp_path / "mean")
    loaded = open_model(tmp_path / "mean")
    assert loaded.step == STEPS and isinstance(loaded.tokenizer, Tokenizer)
    averaged = checkpoints(root, "stage-3")[3:]
    for name, parameter in loaded.decoder.named_parameters():
        parts = torch.stack([c.read_whole(name, weights) for c in averaged])
        assert torch.equal(parameter, parts.double().mean(dim=0).float())
    state = open_run(tmp_path / "mean").state
    assert state["average"] == {"run": str(run), "steps": [4, 5, 6], "weights": weights}


def test_means_say_which_checkpoints_there_are(root: Path, tmp_path: Path) -> None:
    for last, span in ((9, None), (None, (6, 9))):
        with pytest.raises(CheckpointError, match="steps 1, 2, 3, 4, 5, 6: give others"):
            checkpoints_to_average(root / "stage-3", last, span)
    (tmp_path / "there").mkdir()
    chosen = checkpoints_to_average(root / "stage-3", 2, None)
    with pytest.raises(CheckpointError, match="exists already"):
        write_average(root / "stage-3", chosen, "weight", tmp_path / "there")


def test_training_does_not_go_on_from_a_mean(dataset: Path, root: Path, tmp_path: Path) -> None:
    chosen = checkpoints_to_average(root / "stage-3", 2, None)
    write_average(root / "stage-3", chosen, "weight", tmp_path / "mean")
    [message] = train_all([job(dataset, tmp_path / "mean", steps=9)], 1, tmp_path / "ranks")
    assert message is not None and "another optimizer" in message
