"""Memory of saving and loading: a rank's shard of the state and a bounded rest, measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nextpt.config import to_yaml
from tests.support.datasets import tiny
from tests.support.ranks import run_ranks

# bytes: mapped for reading (32 MiB) or hashing (16), one tensor in transit, indexes, and memory
# that Python keeps; measured 38 to 44 MB
REST = 48 * 2**20


def measure(action: str, dataset: Path, folder: Path, ranks: int, stage: int) -> list[dict]:
    name = f"{action}-{ranks}-{stage}"
    config = tiny(
        dataset,
        folder / "run",
        model={"width": 512, "depth": 8},
        train={"zero_stage": stage, "micro_batch_size": 1},
    )
    (folder / f"{name}.yaml").write_text(to_yaml(config))
    # One arena and a separate mapping per large block: freed memory is returned and no longer
    # counts.
    run_ranks(
        [
            "-m",
            "tests.support.state_memory",
            action,
            str(folder / f"{name}.yaml"),
            str(folder / name),
        ],
        ranks,
        folder / f"logs-{name}",
        MALLOC_ARENA_MAX="1",
        MALLOC_MMAP_THRESHOLD_="65536",
    )
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.slow
def test_saving_and_loading_take_memory_of_a_shard(dataset: Path, tmp_path: Path) -> None:
    """Two ranks save at stage 1; four load at stage 3, each a quarter of every parameter."""
    saved = measure("save", dataset, tmp_path, 2, 1)
    loaded = measure("load", dataset, tmp_path, 4, 3)
    whole = saved[0]["whole"]
    assert whole == loaded[0]["whole"] > 270 * 2**20
    for usage in [*saved, *loaded]:
        assert usage["grown"] < usage["share"] + REST < 0.8 * whole, (saved, loaded)
        assert usage["mapped"] == []
