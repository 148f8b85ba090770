"""Collectives on three gloo ranks: values, votes, errors that all ranks raise, subgroups."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nextpt.base.collective import RankGroup, lost_peer, run_on_all_ranks, run_on_rank_0
from nextpt.base.errors import DataError
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("collective")
    run_ranks(["-m", "tests.support.collective_probe", str(folder)], 3, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.process
def test_values_reach_all_ranks(results: list[dict[str, Any]]) -> None:
    for got in results:
        assert got["gathered"] == [{"rank": r, "text": "x" * r} for r in range(3)]
        assert got["broadcast"] == [0, None, 1.5] and got["any"] == [True, False, True]
        assert got["duplicate"] == [0, 1, 2] and got["rank 0"] == {"from": 0}


@pytest.mark.process
def test_each_rank_gets_the_result_of_its_own_action(results: list[dict[str, Any]]) -> None:
    assert [got["own result"] for got in results] == [0, 10, 20]
    assert [got["stop"] for got in results] == [[0, True], [1, True], [2, True]]


@pytest.mark.process
def test_all_ranks_raise_the_error_of_the_first_that_failed(results: list[dict[str, Any]]) -> None:
    for got in results:
        assert got["rank 0 fails"] == ["RunInUseError", "taken", 4, False]
        assert got["one fails"] == ["DataError", "rank 1: bad shard", 2, False]
        kind, message, code, every_rank = got["disk full"]
        assert (kind, code, every_rank) == ("UserError", 2, False)
        assert message == "/disk: No space left on device; free some space"
        assert got["with arguments"] == ["CheckpointError", "rank 2: no room", 2, False]


@pytest.mark.process
def test_ranks_that_differ_are_named(results: list[dict[str, Any]]) -> None:
    for got in results:
        assert got["alike"] is None
        kind, message, *_ = got["unlike"]
        assert kind == "ConfigError" and "rank 1: b = 1 (elsewhere 0)" in message


@pytest.mark.process
def test_a_subgroup_is_a_group(results: list[dict[str, Any]]) -> None:
    assert "subgroup" not in results[0]
    for rank in (1, 2):
        assert results[rank]["subgroup"] == [
            [rank - 1, 2],
            [1, 2],
            [10, 20],
            True,
            1,
            ["DataError", "rank 1: bad", 2, False],
        ]


def test_a_process_without_peers_is_a_group() -> None:
    alone = RankGroup.world()
    assert (alone.rank, alone.world_size, alone.all_gather(3)) == (0, 1, [3])
    assert alone.duplicate().any_of(True, False) == [True, False]
    assert run_on_rank_0(alone, lambda: "x") == "x" and run_on_all_ranks(alone, lambda: 1) == 1

    def fail() -> None:
        raise DataError("bad shard")

    with pytest.raises(DataError, match=r"^bad shard$"):
        run_on_all_ranks(alone, fail)


def test_errors_of_a_lost_peer_are_recognised() -> None:
    reset = RuntimeError("[gloo] Read error [127.0.0.1]:1: Connection reset by peer\nmore")
    assert lost_peer(reset) == "[gloo] Read error [127.0.0.1]:1: Connection reset by peer"
    assert lost_peer(RuntimeError("CUDA out of memory")) is None
    assert lost_peer(ValueError("connection reset")) is None
