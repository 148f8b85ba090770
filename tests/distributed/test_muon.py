"""Muon on real ranks: the same training at any ZeRO stage, number of ranks and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nextpt.config import load_config
from nextpt.model import ModelSpec, parameter_shapes
from nextpt.optim.registry import optimizer_spec
from nextpt.scaling.plan import step_cost
from nextpt.train.zero_layout import zero_layout
from tests.support.optimizer_jobs import Jobs

pytestmark = pytest.mark.process

STEPS = 6
# Every option that changes what is computed with a whole matrix, or with a part of it
MUON = {"normuon_beta": 0.9, "cautious_weight_decay": True, "weight_decay": 0.5}
OPTIMIZER = {"kind": "muon", "lr": 3e-3, "muon": MUON, "embedding": {"lr": 1e-3}}
# Matrices of unequal sizes. Vectors divide among 4 ranks in multiples of 16 elements, because
# torch's fused AdamW rounds what is left over otherwise
SHAPE = {"vocab_size": 64, "width": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn_width": 50}
# One block: at stages 1 and 2 the parts of 2, 3 and 4 ranks end within matrices
MODEL = SHAPE | {"depth": 1, "qk_norm": True}

Layout = tuple[int, str, int]  # ranks, precision, stage
ALL = [(precision, stage) for precision in ("fp32", "bf16") for stage in range(4)]
ALL.remove(("bf16", 0))
HALVED = [("fp32", 0), ("fp32", 2), ("bf16", 1), ("bf16", 3)]
LAYOUTS = [(2, *case) for case in HALVED] + [(1, "fp32", 0), (1, "bf16", 1), (1, "bf16", 3)]
SLOW = [(ranks, *case) for ranks in (1, 2, 3, 4) for case in ALL]
CHAIN = [(2, 1), (1, 3), (3, 2), (2, 0)]  # (ranks, stage) of the steps up to each of 2, 4, 5 and 6


def muon_jobs(dataset: Path, root: Path) -> Jobs:
    return Jobs(dataset, root, STEPS, optimizer=OPTIMIZER)


def weights_job(jobs: Jobs, ranks: int, precision: str, stage: int) -> dict[str, Any]:
    """Three steps with equal data on all ranks; two micro-batches on each."""
    # The gradient's norm is summed in the order of the layout. Clipping, which would carry the
    # rounding of that to every gradient, is in the other runs
    config = jobs.write(
        "none",
        model=MODEL,
        optimizer=OPTIMIZER | {"grad_clip": None},
        data={"sequence_length": 16},
        train={
            "zero_stage": stage,
            "precision": precision,
            "micro_batch_size": 2,
            "global_batch_size": 4 * ranks,
        },
    )
    return {"weights": config, "kind": "muon"}


def run_layouts(jobs: Jobs, layouts: list[Layout]) -> dict[Layout, dict[str, Any]]:
    results = {}
    for ranks in sorted({layout[0] for layout in layouts}):
        own = [layout for layout in layouts if layout[0] == ranks]
        work = [weights_job(jobs, *layout) for layout in own]
        for layout, job, result in zip(own, work, jobs.run(work, ranks), strict=True):
            results[layout] = result | {"config": job["weights"]}
    return results


@pytest.fixture(scope="module")
def layouts(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Any]:
    return run_layouts(muon_jobs(dataset, tmp_path_factory.mktemp("layouts")), LAYOUTS)


@pytest.fixture(scope="module")
def all_layouts(
    layouts: dict[Layout, Any], dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Layout, Any]:
    jobs = muon_jobs(dataset, tmp_path_factory.mktemp("all-layouts"))
    return layouts | run_layouts(jobs, [layout for layout in SLOW if layout not in layouts])


def assert_same_bits(results: dict[Layout, Any], layout: Layout) -> None:
    """As one rank; equal data on all ranks is a batch of its mean.

    At stage 3 DeepSpeed's passes round otherwise: the first loss in bf16 differs, before updates.
    """
    _, precision, stage = layout
    single = results[1, precision, 3 if stage == 3 else int(precision == "bf16")]
    if stage == 3:
        other = results[1, precision, int(precision == "bf16")]
        assert single["losses"] == pytest.approx(other["losses"], rel=1e-3)
    assert results[layout]["losses"] == single["losses"]
    digests = results[layout]["digests"]
    assert digests.keys() == single["digests"].keys()
    assert [key for key in digests if digests[key] != single["digests"][key]] == []


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout[0] > 1], ids=str)
def test_two_ranks_change_no_bit(layouts: dict[Layout, Any], layout: Layout) -> None:
    kinds = {key.split()[1] for key in layouts[layout]["digests"]}
    assert kinds == {"weight", "momentum", "row_square", "exp_avg", "exp_avg_sq"}
    assert_same_bits(layouts, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in SLOW if layout[0] != 3], ids=str)
def test_the_layout_changes_no_bit(all_layouts: dict[Layout, Any], layout: Layout) -> None:
    assert_same_bits(all_layouts, layout)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_three_ranks_follow(all_layouts: dict[Layout, Any], case: tuple[str, int]) -> None:
    """The mean of three equal gradients is rounded."""
    losses = all_layouts[1, case[0], 1]["losses"]
    rel = 2e-5 if case[0] == "fp32" else 5e-3
    assert all_layouts[3, *case]["losses"] == pytest.approx(losses, rel=rel)


def assert_as_planned(result: dict[str, Any], layout: Layout) -> None:
    """What each rank holds and sends is what the formulas of `nextpt plan` say."""
    ranks, _, stage = layout
    config = load_config(result["config"])
    spec, shapes = optimizer_spec(config), parameter_shapes(ModelSpec.from_config(config))
    expected = {
        (t.name, piece.rank, piece.start, piece.length)
        for unit in zero_layout(spec, shapes, stage, ranks)
        for t in unit
        for piece in t.pieces
    }
    held = {(n, r, a, length) for r, own in enumerate(result["shards"]) for n, a, length in own}
    assert held == expected
    cost = step_cost(config, ranks, "cpu")
    assert result["sent"] == list(cost.sent_bytes)
    assert (max(result["sent"]) > 0) == (ranks > 1)
    matrices = {name: shape for name, shape in shapes.items() if name.endswith("proj.weight")}
    # Once each, whatever the number of ranks, and not all on one
    assert sum(cost.flops) == sum(map(spec.flops, matrices.values()))  # type: ignore[attr-defined]
    assert max(cost.flops) < 0.75 * sum(cost.flops) or ranks == 1
    if stage in (0, 3) and ranks > 1:
        # Each way the parts of other ranks; at stage 0 all have the input
        numel = sum(shape[0] * shape[1] for shape in matrices.values())
        ways = 1 if stage == 0 else 2 / ranks
        total = ways * numel * 4 * (ranks - 1)
        assert sum(cost.sent_bytes) == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_hold_and_send_what_the_plan_says(layouts: dict[Layout, Any], layout: Layout) -> None:
    assert_as_planned(layouts[layout], layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW, ids=str)
def test_more_ranks_hold_and_send_what_the_plan_says(
    all_layouts: dict[Layout, Any], layout: Layout
) -> None:
    assert_as_planned(all_layouts[layout], layout)


def train(jobs: Jobs, run: str, **train: Any) -> dict[str, Any]:
    return {"train": jobs.write(run, train=train), "kind": "muon"}


@pytest.fixture(scope="module")
def jobs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    jobs = muon_jobs(dataset, tmp_path_factory.mktemp("muon"))
    work = [
        train(jobs, "one", zero_stage=0),
        train(jobs, "accumulated", zero_stage=0, micro_batch_size=3),
    ]
    assert jobs.run(work, 1) == [None] * len(work)
    work = []
    for precision, stage in HALVED:
        name, options = f"{precision}-{stage}", {"precision": precision, "zero_stage": stage}
        work.append(train(jobs, f"whole-{name}", **options))
        work += [train(jobs, f"halves-{name}", **options, stop_at=stop) for stop in (3, STEPS)]
    config = jobs.write("adamw", optimizer={"lr": 3e-3}, train={"stop_at": 2})
    work.append({"train": config, "kind": "adamw"})
    assert jobs.run(work, 2) == [None] * len(work)
    return jobs


def test_ranks_and_accumulation_train_alike(jobs: Jobs) -> None:
    losses = jobs.losses("one")
    # By 0.037 nats; AdamW's loss falls by 0.103 with all learning rates at 3e-3, and Muon's by 0.32
    # with all at 1e-2
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.03
    assert jobs.losses("accumulated") == pytest.approx(losses, rel=2e-5)
    for stage in (0, 2):
        assert jobs.losses(f"whole-fp32-{stage}") == pytest.approx(losses, rel=2e-5)
    for stage in (1, 3):
        assert jobs.losses(f"whole-bf16-{stage}") == pytest.approx(losses, rel=1e-2)


@pytest.mark.parametrize(("precision", "stage"), HALVED)
def test_resuming_changes_no_bit(jobs: Jobs, precision: str, stage: int) -> None:
    name = f"{precision}-{stage}"
    assert jobs.losses(f"halves-{name}") == jobs.losses(f"whole-{name}")
    whole, halves = (jobs.state(f"{part}-{name}") for part in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert [key for key in whole if not torch.equal(whole[key], halves[key])] == []


def test_checkpoints_hold_the_kinds_of_each_parameter(jobs: Jobs) -> None:
    state = jobs.state("whole-fp32-2")
    for name in {name for name, _ in state}:
        kinds = {kind: value for (n, kind), value in state.items() if n == name}
        shape = kinds["weight"].shape
        if name.endswith("proj.weight"):
            assert {kind: value.shape for kind, value in kinds.items()} == {
                "weight": shape,
                "momentum": shape,
                "row_square": shape[:1],
            }
        else:
            assert kinds.keys() == {"weight", "exp_avg", "exp_avg_sq"}
        assert all(value.any() for value in kinds.values()), name


def test_ranks_and_stage_may_change(jobs: Jobs) -> None:
    for stop, (ranks, stage) in zip([2, 4, 5, STEPS], CHAIN, strict=True):
        assert jobs.run([train(jobs, "chain", zero_stage=stage, stop_at=stop)], ranks) == [None]
    assert jobs.losses("chain") == pytest.approx(jobs.losses("one"), rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_other_layouts_load_the_same_state(jobs: Jobs, ranks: int) -> None:
    """What is loaded by other ranks at any stage is saved again as it was."""
    work = [
        {
            "reload": jobs.write("whole-fp32-2", train={"zero_stage": stage}),
            "to": str(jobs.root / f"reloaded-{ranks}-{stage}" / "checkpoints"),
            "kind": "muon",
        }
        for stage in range(4)
    ]
    jobs.run(work, ranks)
    expected = jobs.state("whole-fp32-2")
    for stage in range(4):
        state = jobs.state(f"reloaded-{ranks}-{stage}")
        assert state.keys() == expected.keys()
        assert [key for key in state if not torch.equal(state[key], expected[key])] == []


def test_a_bad_step_changes_nothing(jobs: Jobs) -> None:
    work = [
        {
            "bad step": jobs.write(
                "bad",
                model={"vocab_size": 64, "width": 32, "heads": 2, "kv_heads": 1},
                data={"sequence_length": 16},
                train={"micro_batch_size": 2, "global_batch_size": 16, "zero_stage": stage},
            ),
            "kind": "muon",
        }
        for stage in range(4)
    ]
    ratios = []
    for result in jobs.run(work, 2):
        assert [bool(reason) for reason in result["reasons"]] == [False, True, False]
        for good, bad, next_good in result["digests"]:
            assert good == bad != next_good
        ratios.append(result["ratios"][0])
    assert ratios[0].keys() == {"attention", "embedding", "feed_forward", "norms", "output"}
    assert all(0 < ratio < 1 for ratio in ratios[0].values())
    for other in ratios[1:]:
        assert other == pytest.approx(ratios[0], rel=1e-3)


def test_a_run_keeps_its_optimizer(jobs: Jobs) -> None:
    [message] = jobs.run([train(jobs, "adamw")], 1)
    assert "holds another run" in message and "optimizer.kind: adamw -> muon" in message
    assert "give another run.dir" in message
