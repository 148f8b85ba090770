"""Refusals at start, with the one-line message that the user reads. One process runs all."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from tests.support.datasets import make_dataset, tiny
from tests.support.ranks import train_all

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def outcome(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    root = tmp_path_factory.mktemp("refusals")
    other = make_dataset(
        Path(sysconfig.get_path("stdlib")) / "asyncio", root / "other", vocab_size=512
    )
    damaged = root / "damaged"
    shutil.copytree(dataset, damaged)
    shard = damaged / "train" / "code" / "g00000" / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    base = {
        "steps": 2,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "precision": "fp32",
        "log_every": 1,
    }
    run = root / "run"

    def wide(**changes: object) -> dict[str, object]:
        return {
            "vocab_size": 512,
            "depth": 2,
            "width": 32,
            "heads": 4,
            "kv_heads": 2,
            "qk_norm": True,
        } | changes

    named = {
        "first": tiny(dataset, run, train=base),
        "complete": tiny(dataset, run, train=base),
        "other model": tiny(dataset, run, train=base, model=wide(width=64)),
        "missing step": tiny(dataset, run, train=base, checkpoint={"resume": 7}),
        "never": tiny(dataset, run, train=base, checkpoint={"resume": "never"}),
        "changed data": tiny(other, run, train=base | {"steps": 3}),
        "accepted data": tiny(
            other, run, train=base | {"steps": 3}, checkpoint={"accept_changed_data": True}
        ),
        "longer, other micro-batch and stage": tiny(
            dataset,
            run,
            train=base | {"steps": 4, "micro_batch_size": 4, "zero_stage": 3},
            checkpoint={"accept_changed_data": True},
        ),
        "vocabulary": tiny(dataset, root / "a", train=base, model=wide(vocab_size=1024)),
        "sequence": tiny(dataset, root / "a", train=base, data={"sequence_length": 32}),
        "no data": tiny(root / "nowhere", root / "a", train=base),
        "unknown domain": tiny(dataset, root / "a", train=base, data={"mixing": {"poems": 1.0}}),
        "no token weights": tiny(
            dataset, root / "a", train=base, objective={"token_weights": True}
        ),
        "attention": tiny(dataset, root / "a", train=base, model=wide(attention="slow")),
        "attention elsewhere": tiny(
            dataset, root / "a", train=base, model=wide(attention="triton")
        ),
        "damaged shard": tiny(damaged, root / "b", train=base),
    }
    messages = train_all(list(named.values()), 1, root / "logs")
    assert not (root / "a").exists() or not list((root / "a").rglob("step-*"))
    return dict(zip(named, messages, strict=True))


@pytest.mark.parametrize(
    "name", ["first", "complete", "accepted data", "longer, other micro-batch and stage"]
)
def test_allowed(outcome: dict[str, str | None], name: str) -> None:
    assert outcome[name] is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other model", ["model.width: 32 -> 64", "run.dir"]),
        ("missing step", ["checkpoint.resume = 7", "there are: 2"]),
        ("never", ["checkpoint.resume = never", "step 2"]),
        ("changed data", ["checkpoint.accept_changed_data=true"]),
        ("vocabulary", ["model.vocab_size = 1024", "model.vocab_size=512"]),
        ("sequence", ["data.sequence_length = 32", "64"]),
        ("no data", ["nowhere", "is not there", "nextpt prep shards"]),
        ("unknown domain", ["data.mixing", "poems", "code, prose"]),
        ("no token weights", ["objective.token_weights", "no token_weights column"]),
        ("attention", ["model.attention = slow", "sdpa"]),
        ("attention elsewhere", ["model.attention = triton", "does not run on cpu"]),
        ("damaged shard", ["shard.00000.mds", "damaged"]),
    ],
)
def test_refused_in_one_line(outcome: dict[str, str | None], name: str, words: list[str]) -> None:
    message = outcome[name]
    assert message is not None and "\n" not in message
    for word in words:
        assert word in message
