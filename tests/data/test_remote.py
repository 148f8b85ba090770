"""Remote datasets: a real S3 server, processes that share copies, damaged copies, the limit."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from nextpt.base.errors import ConfigError, DataError
from nextpt.data import remote as remote_module
from nextpt.data.loader import Loader
from nextpt.data.remote import RemoteDataset
from nextpt.data.scratch import ScratchFolder
from nextpt.data.store import ShardCache
from tests.support.commands import start_script
from tests.support.datasets import tiny
from tests.support.layouts import rewrite
from tests.support.object_store import s3_server

BUCKET = "corpus"


@pytest.fixture(scope="module")
def packed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewrite(
        dataset, tmp_path_factory.mktemp("packed") / "d", compression="zstd", shard_sequences=8
    )


@pytest.fixture(scope="module")
def grouped(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewrite(dataset, tmp_path_factory.mktemp("grouped") / "d", shard_sequences=8)


@pytest.fixture(scope="module")
def few(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Datasets of few files, for a slow server."""
    root = tmp_path_factory.mktemp("few")
    return {
        name: rewrite(dataset, root / name, compression=kind, shard_sequences=128)
        for name, kind in (("packed", "zstd"), ("grouped", None))
    }


@pytest.fixture(scope="module")
def s3(few: dict[str, Path]) -> Iterator[None]:
    with s3_server(BUCKET) as address:
        client = boto3.client("s3", endpoint_url=address)
        for name, folder in few.items():
            for file in (f for f in folder.rglob("*") if f.is_file()):
                client.upload_file(str(file), BUCKET, f"{name}/{file.relative_to(folder)}")
        yield


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "PAUSE", 0.01)


def finish(loader: Loader) -> None:
    """Close the loader, and wait for pending reads."""
    loader.close()
    loader.dataset.threads.shutdown(wait=True)


def loader_of(remote: str | Path | None, path: Path, tmp_path: Path, **data: object) -> Loader:
    return Loader(
        tiny(
            path,
            Path("unused"),
            data={"remote": str(remote) if remote else None, "scratch": str(tmp_path / "node")}
            | data,
        ),
        0,
        1,
    )


def first_steps(loader: Loader, steps: int = 12) -> list[bytes]:
    digests = [
        batch.tokens.numpy().tobytes()
        for step in range(steps)
        for batch in loader.step_batches(step)
    ]
    finish(loader)
    return digests


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["packed", "grouped"])
def test_a_dataset_of_an_object_store_gives_the_same_batches(
    few: dict[str, Path], s3: None, name: str, tmp_path: Path
) -> None:
    expected, cache = first_steps(loader_of(None, few[name], tmp_path)), tmp_path / "cache"
    loader = loader_of(f"s3://{BUCKET}/{name}/", cache, tmp_path)
    assert first_steps(loader) == expected
    cached = {str(f.relative_to(cache)) for f in cache.rglob("*") if f.is_file()}
    assert {
        "dataset.json",
        "tokenizer.json",
        "token_bytes.npy",
        "validation_text/code.jsonl",
        "train/code/index.json",
    } <= cached
    assert any(n.endswith(".mds") for n in cached) and not any(
        n.endswith(".zstd") or ".incoming/" in n for n in cached
    )


@pytest.mark.thorough
def test_a_loader_counts_an_epoch_in_what_it_has_fetched(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, fetch = [], remote_module.RemoteDataset.fetch

    def recorded(remote: RemoteDataset, name: str, *arguments: Any) -> None:
        names.append(name)
        fetch(remote, name, *arguments)

    monkeypatch.setattr(remote_module.RemoteDataset, "fetch", recorded)
    data = {"remote": str(packed), "scratch": str(tmp_path / "node")}
    length = {"steps": None, "epochs": 1}
    loader = Loader(tiny(tmp_path / "cache", tmp_path, data=data, train=length), 0, 1)
    assert {"dataset.json", "token_bytes.npy"} <= set(names) and len(names) == len(set(names))
    sequences = sum(int(shards.sum()) for shards in loader.dataset.shard_sizes)
    assert loader.config.train.epoch_sequences == sequences
    assert loader.last_step == -(-sequences // 8)
    finish(loader)


@pytest.mark.thorough
def test_a_damaged_copy_is_fetched_again(packed: Path, tmp_path: Path) -> None:
    expected = first_steps(loader_of(packed, tmp_path / "cache", tmp_path))
    for shard in (tmp_path / "cache").rglob("*.mds"):
        shard.write_bytes(shard.read_bytes()[:-3] + b"rot")
    (tmp_path / "cache" / "train" / "code" / "index.json").write_text("{}")
    assert first_steps(loader_of(packed, tmp_path / "cache", tmp_path)) == expected


@pytest.mark.thorough
def test_damaged_objects_of_the_store_are_refused_by_name(grouped: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(grouped, tmp_path / "source"))
    for shard in source.rglob("*.mds"):
        shard.write_bytes(shard.read_bytes()[:-3] + b"rot")
    loader = loader_of(source, tmp_path / "cache", tmp_path)
    with pytest.raises(
        DataError,
        match=(
            r"source/train/\w+/g\d{5}/shard.\d{5}.mds cannot be fetched \(3 attempts\): its xxh64"
            r" differs"
        ),
    ):
        loader.step_batches(0)
    finish(loader)
    assert not list((tmp_path / "cache").rglob("*.mds")) and not list(
        (tmp_path / "cache" / ".incoming").iterdir()
    )
    for shard in source.rglob("*.mds"):
        shard.unlink()
    loader = loader_of(source, tmp_path / "cache", tmp_path)
    with pytest.raises(DataError, match=r"shard.\d{5}.mds cannot be fetched"):
        loader.step_batches(0)
    finish(loader)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("remote", "message"),
    [
        ("s3://corpus/nothing", "s3://corpus/nothing/dataset.json cannot be fetched"),
        ("s3://nowhere/x", "s3://nowhere/x/dataset.json cannot be fetched"),
    ],
)
def test_a_store_without_the_dataset_is_refused(
    s3: None, remote: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        loader_of(remote, tmp_path / "cache", tmp_path)
    assert not list((tmp_path / "cache" / ".incoming").iterdir())


def test_invalid_uris_are_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.remote = ftp://x"):
        loader_of("ftp://x", tmp_path / "cache", tmp_path)
    with pytest.raises(ConfigError, match="same folder"):
        loader_of(packed, packed, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.path"):
        loader_of(packed, tmp_path / "file", tmp_path)


def test_copies_of_another_dataset_are_not_mixed(
    packed: Path, grouped: Path, tmp_path: Path
) -> None:
    loader_of(packed, tmp_path / "cache", tmp_path).close()
    with pytest.raises(DataError, match="copies of another dataset"):
        loader_of(grouped, tmp_path / "cache", tmp_path)


def test_an_index_of_the_store_that_is_not_the_manifests_is_refused(
    packed: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(packed, tmp_path / "source"))
    (source / "train" / "code" / "index.json").write_text("{}")
    with pytest.raises(
        DataError,
        match=(
            r"train/code/index\.json cannot be fetched .* not the one that dataset\.json was"
            r" written with"
        ),
    ):
        loader_of(source, tmp_path / "cache", tmp_path)


def test_an_unfinished_dataset_is_refused_and_leaves_nothing(packed: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(packed, tmp_path / "source"))
    raw = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps(raw | {"format_version": 1}))
    with pytest.raises(DataError, match="format version 1"):
        loader_of(source, tmp_path / "cache", tmp_path)
    assert not (tmp_path / "cache" / "dataset.json").exists()


READER = """
import sys, json, hashlib
from pathlib import Path
import nextpt.data.remote as remote
from tests.data.test_remote import loader_of, first_steps
fetched = []
fetch = remote.RemoteDataset.fetch
def record(self, name, target, check=lambda path: None):
    fetched.append(name)
    fetch(self, name, target, check)
remote.RemoteDataset.fetch = record
source, folder = sys.argv[1], Path(sys.argv[2])
tokens = first_steps(loader_of(source, folder / "cache", folder))
print(json.dumps([hashlib.sha256(b"".join(tokens)).hexdigest(), fetched]))
"""


@pytest.mark.process
def test_processes_of_a_machine_share_one_copy(packed: Path, tmp_path: Path) -> None:
    processes = [start_script("-c", READER, str(packed), str(tmp_path)) for _ in range(3)]
    results = [
        json.loads(process.communicate(timeout=600)[0].splitlines()[-1]) for process in processes
    ]
    assert len({digest for digest, _ in results}) == 1
    shards = [name for _, names in results for name in names if name.endswith(".zstd")]
    assert len(shards) == len(set(shards)) > 20
    assert sum(name == "token_bytes.npy" for _, names in results for name in names) == 1


def test_leftovers_of_killed_processes_are_removed(packed: Path, tmp_path: Path) -> None:
    import socket

    incoming = tmp_path / "cache" / ".incoming"
    incoming.mkdir(parents=True)
    dead = f"{socket.gethostname()}-4194305-1-x"
    alive = f"{socket.gethostname()}-{os.getpid()}-1-x"
    elsewhere = "other-host-4194305-1-x"
    for name in (dead, alive, elsewhere):
        (incoming / name).touch()
    loader_of(packed, tmp_path / "cache", tmp_path).close()
    assert {f.name for f in incoming.iterdir()} == {alive, elsewhere}


@pytest.mark.thorough
def test_the_cache_stays_below_its_limit_and_the_batches_do_not_change(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A dataset this small is read as a whole
    monkeypatch.setattr(ShardCache, "check", lambda self, needed: None)
    expected = first_steps(loader_of(None, packed, tmp_path), 40)
    trimmed = []
    trim, turn = ShardCache.trim, threading.Lock()

    def trim_and_measure(cache: ShardCache, written: int) -> None:
        # No other thread deletes what was measured, or writes more than a file meanwhile
        with turn:
            for store in cache._stores:  # as if an hour had passed
                for path, _, _ in store.copies():
                    os.utime(path, (path.stat().st_mtime - 3600,) * 2)
            trim(cache, written)
            trimmed.append(sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.mds")))

    monkeypatch.setattr(ShardCache, "trim", trim_and_measure)
    limit, shard = 100_000, 3_500
    assert (
        first_steps(
            loader_of(packed, tmp_path / "cache", tmp_path, cache_limit_gib=limit / 2**30), 40
        )
        == expected
    )
    raw = [
        s["raw_data"]["bytes"]
        for d in ("code", "prose")
        for s in json.loads((packed / "train" / d / "index.json").read_text())["shards"]
    ]
    assert sum(raw) > 2.5 * limit and max(raw) <= shard
    # Eight threads may each write a file
    assert len(trimmed) > 30 and max(trimmed) <= limit + 8 * shard
    assert len(list(packed.rglob("*.zstd"))) > 30  # the source is whole


def test_the_least_recently_used_copy_is_deleted_first_and_only_copies_are(
    packed: Path, tmp_path: Path
) -> None:
    loader = loader_of(packed, tmp_path / "cache", tmp_path)
    store = loader.dataset._stores["train"][0]
    paths = [store.ensure_local(i) for i in range(4)]
    loader.close()
    for path in (*(tmp_path / "cache").rglob("*.mds"), *(tmp_path / "node" / "verified").iterdir()):
        os.utime(path, (1000, 1000))
    for path in paths:
        # The modification times moved: the marks differ now
        store.scratch.verified_marker(path, store.index[paths.index(path)].raw.xxh64).touch()
    os.utime(store.scratch.verified_marker(paths[2], store.index[2].raw.xxh64), (500, 500))
    for i in (0, 1, 3):
        os.utime(
            store.scratch.verified_marker(paths[i], store.index[i].raw.xxh64), (2000 + i, 2000 + i)
        )
    stranger = paths[0].parent / "notes.txt"
    stranger.write_text("mine" * 1000)
    cache = ShardCache(ScratchFolder(tmp_path / "node"), sum(p.stat().st_size for p in paths) - 1)
    cache.add(store)
    cache.trim()
    assert [p.exists() for p in paths] == [True, True, False, True]
    nothing = ShardCache(ScratchFolder(tmp_path / "node"), 1)
    nothing.add(store)
    nothing.trim()
    assert not any(p.exists() for p in paths) and stranger.exists()


def test_limits_below_the_required_size_are_refused(
    packed: Path, grouped: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="nothing is cached"):
        loader_of(None, grouped, tmp_path, cache_limit_gib=1)
    with pytest.raises(ConfigError, match=r"read ahead together take .* GiB; raise it"):
        loader_of(packed, tmp_path / "cache", tmp_path, cache_limit_gib=1e-6)
    loader_of(None, packed, tmp_path, cache_limit_gib=1).close()
