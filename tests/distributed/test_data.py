"""Data on real ranks: backends train alike; an unreadable shard ends all ranks and is named."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from nextpt.config import Config, load_config
from nextpt.data.loader import Loader
from tests.support.datasets import tiny
from tests.support.layouts import rewrite
from tests.support.ranks import train_all

pytestmark = pytest.mark.process

TRAIN = {"global_batch_size": 8, "micro_batch_size": 2, "log_every": 1, "steps": 20}


def damage_shard(config: Config, steps: int = 9) -> tuple[Path, int]:
    """Damage a shard that only rank 1 reads, in a single step that is not among the first three.

    Returns:
        The shard's path, and the number of steps before the one that reads it.
    """
    loader = Loader(config, 0, 2)
    user: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for at in range(steps):
        for rank in (0, 1):
            loader.rank = rank
            for positions in loader.positions(at):
                for domain, row in zip(
                    *loader._order.locate(positions.start, positions.stop), strict=True
                ):
                    shard = int(
                        np.searchsorted(
                            np.cumsum(loader.dataset.shard_sizes[domain]), row, side="right"
                        )
                    )
                    user.setdefault((int(domain), shard), set()).add((at, rank))
    alone = {shard: next(iter(uses)) for shard, uses in sorted(user.items()) if len(uses) == 1}
    (domain, number), before = next(
        (shard, at) for shard, (at, rank) in alone.items() if rank == 1 and at >= 3
    )
    index = loader.dataset._stores["train"][domain].index
    path = index.folder / index[number].raw.name
    path.write_bytes(path.read_bytes()[:-3] + b"rot")
    loader.close()
    return path, before


@pytest.fixture(scope="module")
def runs(
    dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str | None], tuple[Path, int]]:
    root = tmp_path_factory.mktemp("data")
    shards = rewrite(dataset, root / "shards", shard_sequences=2)
    damaged = Path(shutil.copytree(shards, root / "damaged"))
    stages = {"stages": [{"steps": 2, "mixing": {"code": 1}}, {"sequence_length": 24}]}
    configs = {
        name: tiny(
            shards,
            root / name,
            data=stages | {"backend": name},
            train=TRAIN | {"stop_at": 4},
            validation={"every_steps": 2, "sequences": 3},
        )
        for name in ("native", "streaming")
    }
    grown = [
        {"steps": 2, "mixing": {"code": 1}},
        {"steps": 3, "sequence_length": 24},
        {"mixing": {"prose": 1}},
    ]
    configs["grown"] = tiny(
        shards,
        root / "native",
        data={"stages": grown, "max_epochs": 1},
        train=TRAIN | {"stop_at": 6},
    )
    configs["epochs"] = tiny(
        shards,
        root / "epochs",
        train=TRAIN | {"steps": None, "epochs": 0.1},
    )
    configs["changed past"] = tiny(
        shards,
        root / "native",
        data={"stages": [{"mixing": {"prose": 1}}]},
        train=TRAIN | {"stop_at": 7},
    )
    configs["damaged"] = tiny(damaged, root / "run", train=TRAIN)
    configs["damaged held out"] = tiny(
        damaged,
        root / "run-2",
        train=TRAIN | {"stop_at": 1},
        validation={"every_steps": 1, "sequences": 40},
    )
    damaged_shard = damage_shard(configs["damaged"])
    for shard in (damaged / "validation" / "prose").rglob("*.mds"):
        shard.write_bytes(shard.read_bytes()[:-3] + b"rot")
    outcomes = dict(zip(configs, train_all(list(configs.values()), 2, root / "jobs"), strict=True))
    return root, outcomes, damaged_shard


def events(run: Path, kind: str) -> list[dict]:
    return [
        e
        for e in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if e["kind"] == kind
    ]


def test_both_backends_train_alike(
    runs: tuple[Path, dict[str, str | None], tuple[Path, int]],
) -> None:
    root, outcomes, _ = runs
    assert outcomes["native"] is None and outcomes["streaming"] is None
    for kind, names in (("train", ("loss", "bpb", "grad_norm")), ("validation", ("total",))):
        native, streaming = (
            [e for e in events(root / name, kind) if e["step"] <= 4]
            for name in ("native", "streaming")
        )
        assert len(native) == len(streaming) >= 2
        assert [[e[n] for n in names] for e in native] == [[e[n] for n in names] for e in streaming]


def test_a_run_in_epochs_counts_the_sequences_once(
    runs: tuple[Path, dict[str, str | None], tuple[Path, int]],
) -> None:
    root, outcomes, _ = runs
    assert outcomes["epochs"] is None
    config = load_config(root / "epochs" / "config.yaml")
    sequences = config.train.epoch_sequences
    assert sequences is not None
    assert len(events(root / "epochs", "train")) == math.ceil(math.ceil(0.1 * sequences) / 8)


def test_stages_are_added_to_a_running_plan_and_its_past_stays(
    runs: tuple[Path, dict[str, str | None], tuple[Path, int]],
) -> None:
    root, outcomes, _ = runs
    assert outcomes["grown"] is None
    steps = events(root / "native", "train")
    assert (
        [e["step"] for e in steps] == [1, 2, 3, 4, 5, 6]
        and set(steps[5]["domains"]) == {"prose"}
        and len(steps[3]["domains"]) == 2
    )
    message = str(outcomes["changed past"])
    assert (
        "step-000000006 is not that of" in message
        and "the plan before sequence 48" in message
        and "checkpoint.accept_changed_data=true" in message
    )


def test_a_shard_that_one_rank_cannot_read_ends_all_at_the_step_that_needs_it(
    runs: tuple[Path, dict[str, str | None], tuple[Path, int]],
) -> None:
    """All ranks go on to train the next config; rank 0 raises rank 1's message."""
    root, outcomes, (path, before) = runs
    assert (
        outcomes["damaged"]
        == f"rank 1: {path} is damaged: its xxh64 differs from the one in index.json; prepare the"
        " data again or copy it anew"
    )
    assert [e["step"] for e in events(root / "run", "train")] == list(range(1, before + 1))


def test_a_shard_that_validation_cannot_read_ends_all_ranks(
    runs: tuple[Path, dict[str, str | None], tuple[Path, int]],
) -> None:
    assert "validation/prose/g00000/shard.0000" in str(runs[1]["damaged held out"])
    assert len(events(runs[0] / "run-2", "train")) == 1


def test_data_wait_is_logged(
    runs: tuple[Path, dict[str, str | None], tuple[Path, int]],
) -> None:
    waits = [e["data_wait_seconds"] for e in events(runs[0] / "native", "train")]
    assert waits[0] > 0 and all(0 <= wait < 60 for wait in waits)
