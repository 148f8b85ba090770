"""Training jobs on two gloo ranks: ZeRO stages agree, and resuming changes no bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.ranks import train_all

pytestmark = pytest.mark.process

STEPS = 6
# All options of layers that compute together (docs/layers.md)
LAYERS = {
    "sliding_window": 16,
    "layer_pattern": ["local", "global"],
    "local_rope_base": 100.0,
    "ffn": "relu2",
    "attention_sinks": True,
    "attention_gate": "element",
    "value_residual": True,
    "residual_init": "zero",
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "mtp_depth": 2,
}


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_events(run / "metrics.jsonl", "train")]


def auxiliary(run: Path) -> list[float]:
    """Logged losses of both depths of multi-token prediction."""
    events = read_events(run / "metrics.jsonl", "train")
    return [event["auxiliary_losses"][name] for event in events for name in ("mtp_1", "mtp_2")]


def state(run: Path) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint: Checkpoint = open_checkpoint(run / "checkpoints")
    assert checkpoint.step == STEPS
    return {
        (name, kind): checkpoint.read_whole(name, kind)
        for name, kinds in checkpoint.state_shapes().items()
        for kind in kinds
    }


@pytest.fixture(scope="module")
def jobs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All two-rank jobs of this file, in one pair of processes."""
    root = tmp_path_factory.mktemp("jobs")
    configs = []
    for precision, stages in (("fp32", (0, 1, 2, 3)), ("bf16", (1, 2, 3))):
        for stage in stages:
            train = {"zero_stage": stage, "precision": precision, "steps": STEPS}
            configs.append(tiny(dataset, root / f"{precision}-{stage}", train=_train(**train)))
            configs += [
                tiny(
                    dataset,
                    root / f"{precision}-{stage}-resumed",
                    train=_train(**train, stop_at=stop),
                )
                for stop in (2, 4, 6)
            ]
    for micro in (4, 2, 1):
        configs.append(
            tiny(
                dataset,
                root / f"ranks-2-micro-{micro}",
                train=_train(micro_batch_size=micro, zero_stage=2),
            )
        )
    for stage in (2, 3):
        configs.append(
            tiny(
                dataset,
                root / f"recompute-{stage}",
                train=_train(zero_stage=stage, activation_checkpointing=True),
            )
        )
        configs.append(
            tiny(
                dataset,
                root / f"tied-{stage}",
                model={"tied_embeddings": True, "bias": True},
                train=_train(zero_stage=stage),
            )
        )
    configs.append(
        tiny(
            dataset,
            root / "uneven",
            model={"mtp_depth": 2},
            objective={"domain_weights": {"prose": 0.0}},
            train=_train(zero_stage=2),
        )
    )
    for stage, recompute in ((0, False), (3, True)):
        train = _train(zero_stage=stage, activation_checkpointing=recompute)
        configs.append(tiny(dataset, root / f"layers-{stage}", model=LAYERS, train=train))
    assert train_all(configs, 2, root / "logs") == [None] * len(configs)
    return root


@pytest.fixture(scope="module")
def single(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, 1, 2 and 4 accumulation steps."""
    root = tmp_path_factory.mktemp("single")
    configs = [
        tiny(dataset, root / f"ranks-1-micro-{m}", train=_train(micro_batch_size=m, zero_stage=0))
        for m in (8, 4, 2)
    ]
    configs.append(
        tiny(
            dataset,
            root / "uneven",
            model={"mtp_depth": 2},
            objective={"domain_weights": {"prose": 0.0}},
            train=_train(micro_batch_size=8, zero_stage=0),
        )
    )
    assert train_all(configs, 1, root / "logs") == [None] * len(configs)
    return root


def _train(**changes: object) -> dict[str, object]:
    return {
        "steps": STEPS,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "precision": "fp32",
        "log_every": 1,
    } | changes


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_agree_in_fp32(jobs: Path, stage: int) -> None:
    assert losses(jobs / f"fp32-{stage}") == pytest.approx(losses(jobs / "fp32-0"), rel=2e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(jobs: Path, stage: int) -> None:
    expected = losses(jobs / "fp32-0")
    assert losses(jobs / f"bf16-{stage}") == pytest.approx(expected, rel=5e-3)
    assert losses(jobs / f"bf16-{stage}") != expected


def test_options_of_layers_train_alike_at_stage_3(jobs: Path) -> None:
    expected = losses(jobs / "layers-0")
    assert losses(jobs / "layers-3") == pytest.approx(expected, rel=2e-5)
    assert expected[-1] < expected[0] - 0.05
    weights, plain = state(jobs / "layers-3"), state(jobs / "layers-0")
    for name in ("sinks", "gate_proj.weight", "value_share"):
        key = f"blocks.1.attention.{name}", "weight"
        assert weights[key].any() and torch.allclose(weights[key], plain[key], atol=1e-4)
    assert auxiliary(jobs / "layers-3") == pytest.approx(auxiliary(jobs / "layers-0"), rel=2e-5)


def test_training_learns(jobs: Path) -> None:
    curve = losses(jobs / "fp32-0")
    assert len(curve) == STEPS and curve[-1] < curve[0] - 0.1


@pytest.mark.parametrize(
    "job", ["fp32-0", "fp32-1", "fp32-2", "fp32-3", "bf16-1", "bf16-2", "bf16-3"]
)
def test_resuming_twice_changes_no_bit(jobs: Path, job: str) -> None:
    assert losses(jobs / f"{job}-resumed") == losses(jobs / job)
    expected, resumed = state(jobs / job), state(jobs / f"{job}-resumed")
    assert expected.keys() == resumed.keys()
    assert [key for key in expected if not torch.equal(expected[key], resumed[key])] == []


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_two_ranks_equal_one_big_batch(jobs: Path, single: Path, micro: int) -> None:
    assert_same_training(jobs / f"ranks-2-micro-{micro}", single / "ranks-1-micro-8")


@pytest.mark.parametrize("micro", [4, 2])
def test_accumulation_equals_one_big_batch(single: Path, micro: int) -> None:
    assert_same_training(single / f"ranks-1-micro-{micro}", single / "ranks-1-micro-8")


def test_weights_of_zero_for_a_domain_keep_the_normalisation_global(
    jobs: Path, single: Path
) -> None:
    """The micro-batches' weight sums differ widely; means of means would be wrong."""
    assert_same_training(jobs / "uneven", single / "uneven")
    assert auxiliary(jobs / "uneven") == pytest.approx(auxiliary(single / "uneven"), rel=2e-5)


def assert_same_training(run: Path, reference: Path) -> None:
    assert losses(run) == pytest.approx(losses(reference), rel=2e-5)
    norms = [
        [e["grad_norm"] for e in read_events(r / "metrics.jsonl", "train")]
        for r in (run, reference)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputing_activations_changes_nothing(jobs: Path, stage: int) -> None:
    assert losses(jobs / f"recompute-{stage}") == pytest.approx(
        losses(jobs / f"fp32-{stage}"), rel=1e-6
    )


def test_tied_embeddings_train_alike_when_divided(jobs: Path) -> None:
    assert losses(jobs / "tied-3") == pytest.approx(losses(jobs / "tied-2"), rel=2e-5)
    shapes = open_checkpoint(jobs / "tied-3" / "checkpoints").shapes()
    assert "embed_tokens.weight" in shapes and "lm_head.weight" not in shapes


def test_all_stages_keep_the_same_moments(jobs: Path) -> None:
    """Moments agree between the stages; no second moment is all zero."""
    expected = state(jobs / "fp32-0")
    for stage in (1, 2, 3):
        divided = state(jobs / f"fp32-{stage}")
        for key in expected:
            assert torch.allclose(divided[key], expected[key], rtol=5e-2, atol=5e-4), (stage, key)
    assert all(
        tensor.abs().max() > 0 for (_, kind), tensor in expected.items() if kind == "exp_avg_sq"
    )
