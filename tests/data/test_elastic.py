"""Elastic loading: global batches are independent of ranks, micro-batches and threads."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nextpt.data.loader as loader_module
from nextpt.base.errors import ConfigError
from nextpt.config import Config
from nextpt.data.batch import Batch
from nextpt.data.loader import Loader
from tests.support.datasets import tiny
from tests.support.layouts import rewrite

GLOBAL = 64
STAGES = [
    {"steps": 7, "mixing": {"code": 0.7, "prose": 0.3}},
    {"steps": 5, "sequence_length": 16},
    {"mixing": {"prose": 1.0}},
]


@pytest.fixture(scope="module")
def shards(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewrite(dataset, tmp_path_factory.mktemp("elastic") / "d", shard_sequences=9)


def config_of(shards: Path, micro: int, threads: int = 2, **data: Any) -> Config:
    return tiny(
        shards,
        Path("unused"),
        data={"stages": STAGES, "prefetch_threads": threads} | data,
        train={"steps": 40, "global_batch_size": GLOBAL, "micro_batch_size": micro},
    )


def global_batches(config: Config, world: int, steps: range) -> list[dict[str, torch.Tensor]]:
    """Fields of every step's global batch, with sequences in the order of their positions."""
    loaders = [Loader(config, rank, world) for rank in range(world)]
    batches = []
    for step in steps:
        sequences: dict[int, dict[str, torch.Tensor]] = {}
        for loader in loaders:
            for positions, batch in zip(
                loader.positions(step), loader.step_batches(step), strict=True
            ):
                for i, position in enumerate(positions):
                    sequences[position] = {
                        name: getattr(batch, name)[i]
                        for name in vars(batch)
                        if name != "cu_seqlens"
                    }
        assert sorted(sequences) == list(range(step * GLOBAL, (step + 1) * GLOBAL))
        batches.append(
            {
                name: torch.stack([sequences[p][name] for p in sorted(sequences)])
                for name in sequences[step * GLOBAL]
            }
        )
    for loader in loaders:
        loader.close()
    return batches


@pytest.fixture(scope="module")
def whole(shards: Path) -> list[dict[str, torch.Tensor]]:
    return global_batches(config_of(shards, GLOBAL, threads=1), 1, range(24))


def assert_equal(
    batches: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]
) -> None:
    assert len(batches) == len(expected)
    for a, b in zip(batches, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("world", "micro", "threads"), [(1, 16, 3), (2, 8, 1), (4, 16, 2), (8, 2, 4), (64, 1, 1)]
)
def test_ranks_micro_batches_and_threads_only_slice_the_order(
    shards: Path, whole: list[dict[str, torch.Tensor]], world: int, micro: int, threads: int
) -> None:
    assert_equal(global_batches(config_of(shards, micro, threads), world, range(16)), whole[:16])


@pytest.mark.thorough
def test_a_run_may_be_resumed_with_other_ranks_again_and_again(
    shards: Path, whole: list[dict[str, torch.Tensor]]
) -> None:
    """Within stages and across their ends; a checkpoint's state is accepted by each."""
    batches, state = [], None
    for world, micro, steps in (
        (2, 4, range(5)),
        (8, 8, range(5, 13)),
        (1, 32, range(13, 17)),
        (64, 1, range(17, 24)),
    ):
        config = config_of(shards, micro)
        loader = Loader(config, 0, world)
        if state is not None:
            loader.check_state(state)
            assert state["position"] == steps.start * GLOBAL
        state = loader.state(steps.stop)
        loader.close()
        batches += global_batches(config, world, steps)
    assert_equal(batches, whole)


def test_steps_may_be_asked_for_in_any_order(
    shards: Path, whole: list[dict[str, torch.Tensor]]
) -> None:
    loader = Loader(config_of(shards, GLOBAL), 0, 1)
    for step in (0, 11, 3, 3, 12, 0):
        (batch,) = loader.step_batches(step)
        assert torch.equal(batch.tokens, whole[step]["tokens"])
    assert len(loader._ahead) == 2  # prefetched batches of other steps are dropped
    loader.close()


def test_skipped_data_is_not_read_also_after_a_resume(
    shards: Path, whole: list[dict[str, torch.Tensor]]
) -> None:
    """Also across the end of a stage, twice from the same step, and after a prefetch."""
    loader = Loader(config_of(shards, GLOBAL), 0, 1)

    def reads(loader: Loader, step: int) -> int:
        (batch,) = loader.step_batches(step)
        return next(
            n for n, expected in enumerate(whole) if torch.equal(batch.tokens, expected["tokens"])
        )

    assert [reads(loader, step) for step in range(4)] == [0, 1, 2, 3]
    loader.skip_data(2, 5 * GLOBAL)
    assert [reads(loader, step) for step in range(2, 5)] == [5, 6, 7] and loader.skipped == [
        (128, 320)
    ]
    # It reads the 8th batch: the stage ends after 7
    assert [step for step in range(1, 7) if loader.begins_stage(step)] == [4]
    loader.skip_data(2, 8 * GLOBAL)
    assert (
        [reads(loader, step) for step in range(2, 4)] == [8, 9]
        and loader.skipped == [(128, 512)]
        and loader.begins_stage(2)
    )
    loader.skip_data(4, 12 * GLOBAL)
    assert (
        loader.skipped == [(128, 512), (640, 768)]
        and not loader.begins_stage(3)
        and loader.begins_stage(4)
    )
    state = loader.state(5)
    assert state["position"] == 13 * GLOBAL and state["skipped"] == [[128, 512], [640, 768]]
    resumed = Loader(config_of(shards, 16), 1, 2)
    resumed.check_state(state)
    resumed.load_state(state)
    first, second = resumed.positions(5)
    assert (first[0], second[0]) == (13 * GLOBAL + 16, 13 * GLOBAL + 48) and resumed.state(
        5
    ) == state
    older = {name: value for name, value in state.items() if name != "skipped"}
    resumed.load_state(older)
    assert resumed.position(5) == 5 * GLOBAL
    resumed.load_state(older | {"passed_over": state["skipped"]})
    assert resumed.state(5) == state
    for spans in (
        [[0, 1]],
        [[128, 64]],
        [[0, 64], [64, 128]],
        [[0, 64 * GLOBAL]],
        [[0]],
        ["ab"],
        7,
    ):
        with pytest.raises((KeyError, TypeError, ValueError)):
            resumed.load_state(state | {"skipped": spans})
    loader.close()
    resumed.close()


def test_one_epoch_after_another(shards: Path) -> None:
    """Without a mixture an epoch has all sequences once, except at the end of its last block."""
    loader = Loader(
        tiny(shards, Path("unused"), train={"global_batch_size": 64, "micro_batch_size": 64}), 0, 1
    )
    counts = [int(s.sum()) for s in loader.dataset.shard_sizes]
    domains, sequences = loader._order.locate(0, sum(counts))
    for domain, count in enumerate(counts):
        drawn = sequences[domains == domain]
        assert abs(len(drawn) - count) < 0.05 * count and len(set(drawn[:count])) == min(
            len(drawn), count
        )
    loader.close()


def test_stages_change_the_mixture_and_the_context_and_no_shape(
    whole: list[dict[str, torch.Tensor]],
) -> None:
    prose = [float(batch["domain_ids"].double().mean()) for batch in whole]
    assert 0.15 < sum(prose[:7]) / 7 < 0.45 and all(share == 1 for share in prose[12:])
    longest = [int(batch["position_ids"].max()) for batch in whole]
    assert set(longest[:7]) == {63} and set(longest[7:12]) == {15} and set(longest[12:]) == {63}
    assert len({tuple((name, t.shape) for name, t in batch.items()) for batch in whole}) == 1


def test_cu_seqlens_have_one_size_over_all_stages(shards: Path) -> None:
    loader = Loader(config_of(shards, 8), 0, 2)
    most = loader.dataset.max_segments()
    # 64 / 16 - 1 cuts
    assert most and {
        batch.cu_seqlens.shape for step in range(14) for batch in loader.step_batches(step)
    } == {(8 * (most + 3) + 1,)}
    loader.close()


def test_waiting_is_measured(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that the caller waited, without the time of prefetching threads.

    By a clock that only reads of steps 0 and 1 move; later steps are read at the end.
    """
    read, seconds, end = Loader._read_step, [0.0], threading.Event()

    def read_slowly(loader: Loader, step: int) -> list[Batch]:
        if step > 1:
            end.wait()
        batches = read(loader, step)
        seconds[0] += 10.0
        return batches

    monkeypatch.setattr(Loader, "_read_step", read_slowly)
    monkeypatch.setattr(loader_module, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    loader = Loader(config_of(shards, GLOBAL, threads=1), 0, 1)
    loader.step_batches(0)
    first = loader.wait_seconds
    assert first >= 10.0
    wait([loader._ahead[1]])
    loader.step_batches(1)
    assert loader.wait_seconds == first  # it was prefetched
    end.set()
    loader.close()


def test_ranks_that_do_not_divide_the_batch_are_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size"):
        Loader(config_of(shards, 16), 0, 8).step_batches(0)
