"""The output matrix's loss under DeepSpeed on two ranks: every gradient is plain torch's."""

from __future__ import annotations

import json

import pytest

from tests.support.ranks import run_ranks

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("zero")
    run_ranks(["-m", "tests.support.zero_loss", str(folder / "found.json")], 2, folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_over_ranks_and_micro_batches(
    differences: dict[str, dict[str, float]], stage: int, tied: bool, recompute: bool, scaled: bool
) -> None:
    largest = differences[f"{stage} {tied} {recompute} {scaled}"]
    assert {"embedding.weight", "layer.weight", "head.bias"} <= largest.keys() and (
        "head.weight" in largest
    ) != tied
    assert max(largest.values()) < 2e-5, largest
