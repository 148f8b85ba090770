"""Gradient noise scale against brute force, and update ratios against measured changes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nextpt.train.dynamics import noise_scale
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dynamics")
    run_ranks(["-m", "tests.support.dynamics_probe", str(folder / "found.json")], 2, folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_noise_scale_equals_brute_force(stage: int, results: dict[str, Any]) -> None:
    own = results[f"zero-{stage}"]
    assert own["trace"] == pytest.approx(results["brute_force"]["trace"], rel=0.2)
    assert own["scale"] == pytest.approx(results["brute_force"]["scale"], rel=0.2)
    assert own["unmeasured"] is None


@pytest.mark.slow
def test_uneven_micro_batches_are_weighted(results: dict[str, Any]) -> None:
    own = results["uneven"]
    assert own["trace"] == pytest.approx(own["expected_trace"], rel=1e-4)
    assert own["square"] == pytest.approx(own["expected_square"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_update_ratios_equal_the_measured_change(stage: int, results: dict[str, Any]) -> None:
    for step in results[f"zero-{stage}"]["updates"]:
        assert set(step) == {"attention", "embedding", "feed_forward", "norms", "output"}
        assert all(ratio == pytest.approx(moved, rel=2e-3) for ratio, moved in step.values())


def test_noise_scale_of_many_steps_is_a_ratio_of_means() -> None:
    assert noise_scale(
        [{"trace": 2.0, "square": 1.0}, {"trace": 4.0, "square": -0.5}]
    ) == pytest.approx(12)
    assert noise_scale([{"trace": 2.0, "square": -1.0}]) is None and noise_scale([]) is None
