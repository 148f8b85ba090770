"""Data plans: stages, the limit on epochs, and which changes a state allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextpt.base.errors import ConfigError, DataError
from nextpt.config import differences
from nextpt.data import loader as loader_module
from nextpt.data.dataset import Dataset
from nextpt.data.epochs import count_epoch
from nextpt.data.loader import Loader
from tests.support.datasets import tiny
from tests.support.layouts import rewrite

A, B, C = ({"code": share, "prose": 1 - share} for share in (0.8, 0.5, 0.25))


@pytest.fixture(scope="module")
def other(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewrite(dataset, tmp_path_factory.mktemp("other") / "d", shard_sequences=200)


def open_loader(
    dataset: Path, steps: int = 100, seed: int = 0, batch: int = 8, **data: Any
) -> Loader:
    config = tiny(
        dataset,
        Path("unused"),
        run={"seed": seed},
        data=data,
        train={"steps": steps, "global_batch_size": batch, "micro_batch_size": 2},
    )
    loader = Loader(config, 0, 1)
    loader.close()
    return loader


def stages(*parts: tuple[int | None, dict[str, float]]) -> list[dict[str, Any]]:
    return [{"mixing": mixing} | ({"steps": steps} if steps else {}) for steps, mixing in parts]


def test_a_state_is_small_and_the_same_on_all_ranks(dataset: Path) -> None:
    a, b = (
        Loader(
            tiny(dataset, Path("unused"), train={"global_batch_size": 8, "micro_batch_size": m}),
            rank,
            world,
        ).state(50)
        for rank, world, m in ((0, 1, 8), (3, 4, 1))
    )
    assert a == b and a["position"] == 400 and len(str(a)) < 400


@pytest.mark.parametrize(
    "later",
    [
        stages((60, A), (None, B)),
        stages((60, A), (10, B), (None, C)),
        stages((50, A), (None, B)),
        stages((None, A)),
    ],
)
def test_stages_may_be_added_after_the_position(dataset: Path, later: list[dict[str, Any]]) -> None:
    state = open_loader(dataset, stages=stages((None, A))).state(50)
    grown = open_loader(dataset, stages=later)
    grown.check_state(state)
    before = open_loader(dataset, stages=stages((None, A)))._order
    assert [x.tolist() for x in before.locate(0, 400)] == [
        x.tolist() for x in grown._order.locate(0, 400)
    ]


@pytest.mark.parametrize(
    "later",
    [
        {"stages": stages((40, A), (None, B))},
        {"stages": stages((None, B))},
        {"stages": stages((40, A), (None, A))},
        {"mixing": B},
        {"stages": [{"mixing": A, "sequence_length": 32}]},
        {"mixing": A, "seed": 1},
        {},
    ],
)
def test_a_changed_past_is_refused(dataset: Path, later: dict[str, Any]) -> None:
    state = open_loader(dataset, mixing=A).state(50)
    with pytest.raises(DataError, match="the plan before sequence 400"):
        open_loader(dataset, **later).check_state(state)


def test_a_single_stage_equals_a_run_without_stages(dataset: Path) -> None:
    open_loader(dataset, stages=stages((None, A))).check_state(
        open_loader(dataset, mixing=A).state(50)
    )


@pytest.mark.thorough
def test_changed_data_is_named(dataset: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = open_loader(dataset, mixing=A).state(50)
    with pytest.raises(DataError, match=r"^changed since: the dataset") as caught:
        open_loader(other, mixing=A).check_state(state)
    assert "plan" not in str(caught.value) and "version" not in str(caught.value)
    monkeypatch.setattr(loader_module, "ORDER_VERSION", 99)
    changes = r"the version of the order of sequences .* and the dataset"
    with pytest.raises(DataError, match=changes):
        open_loader(other, mixing=A).check_state(state)
    with pytest.raises(DataError, match="older nextpt"):
        open_loader(dataset).check_state({"fingerprint": "x", "position": 3})


def test_a_longer_run_is_the_same_plan(dataset: Path) -> None:
    open_loader(dataset, steps=1000).check_state(open_loader(dataset, steps=60).state(50))


def test_max_epochs_are_checked_over_the_whole_run(dataset: Path) -> None:
    sequences = open_loader(dataset).manifest.splits["train"]["prose"].sequences
    steps = 2 * sequences // 8 + 1
    with pytest.raises(
        ConfigError,
        match=(
            r"data.max_epochs allows 2 epochs over domain prose, but the plan has 2.0\d: \d+"
            rf" draws from {sequences} sequences"
        ),
    ):
        open_loader(dataset, steps=steps, mixing={"prose": 1}, max_epochs={"prose": 2})
    open_loader(dataset, steps=steps - 1, mixing={"prose": 1}, max_epochs={"prose": 2})
    open_loader(dataset, steps=steps, mixing={"prose": 1}, max_epochs={"code": 1e-3})
    with pytest.raises(ConfigError, match="domain prose"):
        open_loader(dataset, steps=steps, mixing={"prose": 1}, max_epochs=2)
    late = [{"steps": steps - 5, "mixing": {"code": 1}}, {"mixing": {"prose": 1}}]
    open_loader(dataset, steps=steps, stages=late, max_epochs={"prose": 2})
    with pytest.raises(ConfigError, match="names domain 'poems'"):
        open_loader(dataset, max_epochs={"poems": 2})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixing": {"poems": 1}}, "data.mixing names domain 'poems'; the dataset has code, prose"),
        ({"mixing": {"code": 0}}, "data.mixing gives every domain the share 0"),
        ({"mixing": {"code": -1}}, "data.mixing.code = -1.0 must be finite"),
        (
            {"mixing": {"code": float("nan")}},
            "data.mixing.code = nan: input should be a finite number",
        ),
        (
            {"stages": [{"steps": 5}, {"mixing": {"poems": 1}}]},
            "data.stages.1.mixing names domain 'poems'",
        ),
        ({"stages": [{}, {}]}, "data.stages.0 has no steps"),
        ({"stages": []}, "data.stages is empty"),
        ({"stages": [{"steps": 5}]}, "data.stages end after 5 steps and the run has 100"),
        (
            {"stages": [{"sequence_length": 65}]},
            "data.stages.0.sequence_length = 65 is above data.sequence_length = 64",
        ),
        ({"stages": [{"steps": 0}]}, "stages.0.steps"),
        (
            {"stages": [{"mixin": {}}]},
            "unknown key data.stages.0.mixin; did you mean data.stages.0.mixing",
        ),
        ({"max_epochs": 0}, "data.max_epochs = 0.0 must be finite and > 0"),
        ({"max_epochs": {"code": -1}}, "data.max_epochs.code = -1.0"),
    ],
)
def test_invalid_plans_are_refused(dataset: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_loader(dataset, **data)


def test_stages_and_location_of_data_may_differ_in_a_resumed_run(dataset: Path) -> None:
    old = tiny(dataset, Path("unused"), data={"mixing": A})
    new = tiny(
        dataset,
        Path("unused"),
        data={
            "mixing": A,
            "stages": [{"mixing": A}],
            "max_epochs": {"code": 3},
            "remote": "s3://x",
            "cache_limit_gib": 1,
            "backend": "streaming",
            "prefetch_threads": 1,
            "scratch": "/x",
        },
    )
    assert differences(old, new)[1] == [] and differences(new, old)[1] == []
    assert differences(old, tiny(dataset, Path("unused"), data={"mixing": B}))[1]


def test_an_epoch_counts_all_training_sequences(dataset: Path, tmp_path: Path) -> None:
    config = tiny(dataset, tmp_path, train={"steps": None, "epochs": 2})
    counted = count_epoch(config)
    sizes = Dataset(config).shard_sizes
    assert counted.train.epoch_sequences == sum(int(shards.sum()) for shards in sizes)
    assert counted.total_steps == -(-2 * counted.train.epoch_sequences // 8)
    assert count_epoch(counted) == counted
