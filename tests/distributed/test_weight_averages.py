"""Averages of the weights: every ZeRO stage, resuming, other ranks, a bad step, means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data_prep.tokenizer import Tokenizer
from launcher.cli import app
from nextpt.base.errors import CheckpointError
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import Config, load_config, to_yaml
from nextpt.data.loader import Loader
from nextpt.evaluate.loaded_model import open_model, open_run
from nextpt.evaluate.metrics import DomainSums, metrics_json
from nextpt.events import read_events
from nextpt.exchange import checkpoints_to_average, export_hf, load_hf, write_average
from nextpt.objective import next_token_loss
from tests.support.datasets import tiny
from tests.support.ranks import run_ranks, train_all

pytestmark = pytest.mark.process

STAGES = range(4)
STEPS = 6
DECAYS = [0.5, 0.9]
VALIDATION = {"every_steps": 2, "sequences": 4, "averages": True}


def job(
    dataset: Path, folder: Path, validation: dict[str, Any] = VALIDATION, **train: Any
) -> Config:
    """A checkpoint of every step, all of them kept."""
    return tiny(
        dataset,
        folder,
        train={"global_batch_size": 6, "micro_batch_size": 1, "ema": DECAYS} | train,
        checkpoint={"every_steps": 1, "keep_last": None},
        validation=validation,
    )


@pytest.fixture(scope="module")
def root(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("averages")
    configs = [job(dataset, root / f"stage-{stage}", zero_stage=stage) for stage in STAGES]
    configs.append(job(dataset, root / "bf16", precision="bf16", zero_stage=2))
    configs += [job(dataset, root / f"plain-{stage}", {}, zero_stage=stage) for stage in STAGES]
    configs.append(job(dataset, root / "plain-bf16", {}, precision="bf16", zero_stage=2))
    configs += [job(dataset, root / "parts", zero_stage=2, stop_at=stop) for stop in (2, STEPS)]
    configs.append(job(dataset, root / "later", {}, ema=None, stop_at=3))
    configs.append(job(dataset, root / "later", ema=0.9, stop_at=5))
    configs.append(job(dataset, root / "later", {}, ema=None))
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
    assert_same_bits(*(checkpoints(root, run)[-1] for run in ("stage-2", "parts")))


def losses(root: Path, run: str) -> list[float]:
    return [event["loss"] for event in read_events(root / run / "metrics.jsonl", "train")]


def assert_same_bits(left: Checkpoint, right: Checkpoint) -> None:
    """The same values in every kind of state of every parameter, averages included."""
    shapes = left.state_shapes()
    assert shapes == right.state_shapes()
    for name, kinds in shapes.items():
        assert {f"ema-{decay}" for decay in DECAYS} < set(kinds)
        for kind in kinds:
            assert torch.equal(left.read_whole(name, kind), right.read_whole(name, kind))


@pytest.mark.parametrize(
    ("run", "plain"),
    [*((f"stage-{stage}", f"plain-{stage}") for stage in STAGES), ("bf16", "plain-bf16")],
)
def test_validating_averages_changes_no_bit(root: Path, run: str, plain: str) -> None:
    assert len(losses(root, run)) == STEPS and losses(root, run) == losses(root, plain)
    for validated, unvalidated in zip(
        checkpoints(root, run), checkpoints(root, plain), strict=True
    ):
        assert_same_bits(validated, unvalidated)


def test_a_signal_in_the_validation_of_an_average_loses_nothing(
    dataset: Path, root: Path, tmp_path: Path
) -> None:
    config = job(dataset, tmp_path / "run", zero_stage=3)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    case = f"validating an average={tmp_path / 'config.yaml'}"
    arguments = ["-m", "tests.support.job_probe", str(tmp_path / "out.json"), case]
    run_ranks(arguments, 2, tmp_path / "probe")
    [(kind, message, _)] = json.loads((tmp_path / "out.json").read_text()).values()
    assert kind == "TrainingStopped" and "after step 2 (saved)" in message
    assert read_events(tmp_path / "run" / "metrics.jsonl", "validation") == []
    stopped = open_checkpoint(tmp_path / "run" / "checkpoints", 2)
    assert_same_bits(stopped, checkpoints(root, "stage-3")[1])
    assert train_all([config], 2, tmp_path / "resumed") == [None]
    assert losses(tmp_path, "run") == losses(root, "stage-3")
    assert_same_bits(checkpoints(tmp_path, "run")[-1], checkpoints(root, "stage-3")[-1])


@pytest.mark.parametrize("run", [f"stage-{stage}" for stage in STAGES])
def test_averages_are_validated_by_name(root: Path, run: str) -> None:
    """Metrics of the averages are of other weights; all stages agree on them."""
    events, others = (
        read_events(root / name / "metrics.jsonl", "validation") for name in (run, "stage-0")
    )
    assert [event["step"] for event in events] == [2, 4, 6]
    for event, other in zip(events, others, strict=True):
        nats = {n: metrics["total"]["nats_per_token"] for n, metrics in event["averages"].items()}
        assert list(nats) == [f"ema-{decay}" for decay in DECAYS]
        assert len({event["total"]["nats_per_token"], *nats.values()}) == 3
        for name, value in nats.items():
            assert list(event["averages"][name]["domains"]) == ["code", "prose"]
            expected = other["averages"][name]["total"]["nats_per_token"]
            assert value == pytest.approx(expected, rel=1e-5)


def test_metrics_of_an_average_are_those_of_a_model_opened_with_it(root: Path) -> None:
    [*_, event] = read_events(root / "stage-1" / "metrics.jsonl", "validation")
    loader = Loader(load_config(root / "stage-1" / "config.yaml"), 0, 1, pin=False)
    for name, metrics in event["averages"].items():
        model = open_model(root / "stage-1", weights=name).decoder
        sums = DomainSums(loader.domains, torch.device("cpu"))
        for domain in range(len(loader.domains)):
            for batch in loader.validation_batches(domain, VALIDATION["sequences"]):
                with torch.no_grad():
                    nats = next_token_loss(model, batch, torch.ones(()), 0.0).nats
                sums.add(nats, batch.target_bytes, batch.is_text, batch.domain_ids)
        for domain, expected in metrics_json(sums)["domains"].items():
            assert metrics["domains"][domain] == pytest.approx(expected)


def test_averages_may_begin_and_end_in_the_run(root: Path) -> None:
    saved = checkpoints(root, "later")
    assert ["ema-0.9" in c.state["scalars"] for c in saved] == [False] * 3 + [True] * 2 + [False]
    for name in saved[0].shapes():
        weights = [checkpoint.read_whole(name) for checkpoint in saved[3:5]]
        average = saved[4].read_whole(name, "ema-0.9")
        assert torch.equal(average, expected_average(weights, 0.9))


@pytest.fixture(scope="module")
def probes(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Results of the jobs of `tests.support.sign_momentum`, by stage."""
    root, jobs = tmp_path_factory.mktemp("probes"), []
    for stage in STAGES:
        config = tiny(
            dataset,
            root / "run",
            model={"vocab_size": 64, "heads": 2, "kv_heads": 1},
            data={"sequence_length": 16},
            optimizer={"lr": 3e-3},
            train={"micro_batch_size": 2, "global_batch_size": 16, "ema": 0.9, "zero_stage": stage},
        )
        path = root / f"{stage}.yaml"
        path.write_text(to_yaml(config))
        jobs += [{kind: str(path)} for kind in ("bad step", "average")]
    (root / "jobs.json").write_text(json.dumps(jobs))
    module = "tests.support.sign_momentum"
    arguments = ["-m", module, str(root / "jobs.json"), str(root / "out.json")]
    run_ranks(arguments, 2, root)
    results = json.loads((root / "out.json").read_text())
    return {"bad step": results[::2], "average": results[1::2]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_step_moves_nothing(probes: dict[str, list[Any]], stage: int) -> None:
    result = probes["bad step"][stage]
    assert [bool(reason) for reason in result["reasons"]] == [False, True, False]
    for good, bad, next_good in result["digests"]:
        assert good == bad != next_good


@pytest.mark.parametrize("stage", STAGES)
def test_weights_return_when_an_average_took_their_place(
    probes: dict[str, list[Any]], stage: int
) -> None:
    """Working weights too, unless an exception ends the job; what is saved always."""
    for digests in probes["average"][stage]:
        before, averaged, after, _ = digests["all"]
        assert before == after != averaged
        before, averaged, after, after_exception = digests["saved"]
        assert before == after == after_exception != averaged


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


def test_results_say_which_weights_they_are_of(root: Path, tmp_path: Path) -> None:
    run = root / "stage-1"
    (tmp_path / "text").write_text("words\n")
    for weights in ("weight", "ema-0.9"):
        chosen = ["--run", str(run), "--weights", weights]
        for arguments in (
            ["generate", *chosen, "--prompt", "a", "--max-tokens", "2", "--save"]
            + ["--json", str(tmp_path / "generated.json")],
            ["inspect", *chosen, "--text", str(tmp_path / "text"), "--output", str(tmp_path)],
        ):
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
        model = {"run": str(run), "step": STEPS, "weights": weights}
        for name in ("generated.json", "inspect.json"):
            assert model.items() <= json.loads((tmp_path / name).read_text()).items()
        page = (tmp_path / "tokens.html").read_text()
        assert ("weights ema-0.9" in page) == (weights == "ema-0.9")
    samples = json.loads((run / "samples.json").read_text())
    assert [sample["weights"] for sample in samples] == ["weight", "ema-0.9"]


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
