"""Uploads to a real HTTP S3 and to folders, interrupted and continued.

mosaicml-streaming reads the uploaded copy.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest

from data_prep.format import DatasetManifest
from data_prep.upload import NOTE, files_of_dataset, upload
from nextpt.base.errors import DataPrepError, StoreError
from tests.support.commands import run_command, run_script, start_command
from tests.support.object_store import s3_server
from tests.support.shards import write_dataset


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server("bucket") as address:
        yield address


def names(address: str, prefix: str) -> dict[str, int]:
    """Size of each object below `prefix`, without pyarrow's empty ones for folders."""
    pages = (
        boto3.client("s3", endpoint_url=address)
        .get_paginator("list_objects_v2")
        .paginate(Bucket="bucket", Prefix=prefix + "/")
    )
    return {
        o["Key"].removeprefix(prefix + "/"): o["Size"]
        for page in pages
        for o in page.get("Contents", [])
        if not o["Key"].endswith("/")
    }


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Twenty shards of three rows in each of two domains."""
    rows = [
        {"tokens": [9, i % 7, 9, 9, 2, 3, 4, 9], "doc_lens": [3, 5], "doc_flags": [0, 0]}
        for i in range(60)
    ]
    return write_dataset(
        tmp_path / "data",
        {"a": rows, "b": rows},
        start_id=9,
        end_id=9,
        vocab_size=10,
        size_limit=500,
    )


def test_shards_go_first_and_the_manifest_last(many: Path) -> None:
    (many / ".hidden").write_text("x")
    (many / "train" / "a" / "left.over").write_text("x")
    shards, others, last = files_of_dataset(many, DatasetManifest.load(many))
    assert len(shards) == 40 and all(f.name.endswith(".mds") and f.xxh64 for f in shards)
    assert [f.name for f in others] == ["token_bytes.npy", "tokenizer.json"]
    assert [f.name for f in last] == ["train/a/index.json", "train/b/index.json", "dataset.json"]


def test_to_a_folder_and_again(many: Path, tmp_path: Path) -> None:
    target = tmp_path / "a b" / "copy"
    first = upload(many, str(target))
    assert files(target) == files(many)
    assert (first.sent_files, first.present_files) == (45, 0) and first.sent_bytes == sum(
        map(len, files(many).values())
    )
    second = upload(many, str(target))
    assert (second.sent_files, second.present_files) == (5, 40) and files(target) == files(many)
    DatasetManifest.load(target)


def test_to_a_scheme_of_fsspecs(many: Path) -> None:
    import fsspec

    assert upload(many, "memory://some/where").sent_files == 45
    store = fsspec.filesystem("memory")
    assert {
        p.removeprefix("/some/where/"): store.cat_file(p) for p in store.find("/some/where")
    } == files(many)
    assert upload(many, "memory://some/where").present_files == 40


@pytest.mark.thorough
def test_a_damaged_shard_stops_an_upload_that_can_be_continued(s3: str, many: Path) -> None:
    shard = many / "train" / "b" / "g00000" / "shard.00007.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataPrepError, match=r"shard.00007.mds is damaged"):
        upload(many, "s3://bucket/damaged", threads=1)
    there = names(s3, "damaged")
    shards = [f"train/{domain}/g00000/shard.{i:05d}.mds" for domain in "ab" for i in range(20)]
    assert (
        set(shards[:27]) | {NOTE} <= set(there) < set(shards) | {NOTE} and shards[27] not in there
    )
    shard.write_bytes(whole)
    assert upload(many, "s3://bucket/damaged").present_files == len(there) - 1
    assert names(s3, "damaged") == {name: len(data) for name, data in files(many).items()}


@pytest.mark.process
def test_killed_and_started_again(s3: str, many: Path) -> None:
    command = ["prep", "upload", str(many), "s3://bucket/killed", "--threads", "1"]
    process = start_command(*command)
    while process.returncode is None and len(names(s3, "killed")) < 3:
        time.sleep(0.01)
    process.kill()
    process.wait()
    if "dataset.json" not in names(s3, "killed"):  # else it was too fast to be killed
        assert NOTE in names(s3, "killed")
    completed = run_command(*command)
    assert completed.returncode == 0 and "were there already" in completed.stdout, completed.stderr
    assert names(s3, "killed") == {name: len(data) for name, data in files(many).items()}


def test_a_partial_file_is_sent_again(many: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    upload(many, str(target))
    shard = target / "train" / "a" / "g00000" / "shard.00003.mds"
    shard.write_bytes(shard.read_bytes()[:-5])
    assert upload(many, str(target)).present_files == 39 and files(target) == files(many)


def test_files_without_a_manifest_are_sent_again(many: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    upload(many, str(target))
    (target / "dataset.json").unlink()
    shard = target / "train" / "a" / "g00000" / "shard.00003.mds"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    assert upload(many, str(target)).present_files == 0 and files(target) == files(many)


def test_another_dataset_is_not_overwritten(many: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    upload(many, str(target))
    before = files(target)
    manifest = json.loads((many / "dataset.json").read_text())
    (many / "dataset.json").write_text(json.dumps(manifest | {"fingerprint": "f" * 64}))
    with pytest.raises(DataPrepError, match="copy holds another dataset"):
        upload(many, str(target))
    (target / "dataset.json").unlink()
    (target / NOTE).write_text("a" * 64)
    with pytest.raises(DataPrepError, match="another dataset, or part of one"):
        upload(many, str(target))
    assert {k: v for k, v in files(target).items() if k != NOTE} == {
        k: v for k, v in before.items() if k != "dataset.json"
    }


def test_an_incomplete_dataset_is_not_sent(many: Path, tmp_path: Path) -> None:
    (many / "train" / "a" / "g00000" / "shard.00003.mds").unlink()
    with pytest.raises(DataPrepError, match=r"shard.00003.mds is missing"):
        upload(many, str(tmp_path / "copy"))
    shutil.rmtree(many)
    with pytest.raises(DataPrepError, match="is not there"):
        upload(many, str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_refusals_of_stores_are_explained(
    s3: str, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="s3://nowhere/x: there is no such bucket"):
        upload(many, "s3://nowhere/x")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file/x"):
        upload(many, str(tmp_path / "file" / "x"))
    # The port of "discard": nobody listens
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="cannot be reached"):
        upload(many, "s3://bucket/x")


READ = """
import sys, json, tempfile
import numpy as np
from data_prep.streaming_compat import import_streaming
import_streaming()
from streaming import Stream, StreamingDataset
remote, split, domains, output = sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4]
with tempfile.TemporaryDirectory() as local:
    streams = [Stream(remote=f"{remote}/{split}/{d}", local=f"{local}/{d}") for d in domains]
    dataset = StreamingDataset(streams=streams, batch_size=1, shuffle=False, num_canonical_nodes=1)
    rows = [s["tokens"] for s in dataset]
np.save(output, np.stack(rows))
"""


@pytest.mark.process
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_streaming_downloads_what_was_uploaded(
    s3: str, dataset: Path, many: Path, tmp_path: Path, compression: str | None
) -> None:
    """Through StreamingDataset, in its own process: it leaves threads and shared memory behind."""
    from data_prep.stored import read_sequences, shards_of

    data = dataset
    if compression:
        rows = [
            {"tokens": [9, i % 7, 9, 9, 2, 3, 4, 9], "doc_lens": [3, 5], "doc_flags": [0, 0]}
            for i in range(30)
        ]
        data = write_dataset(
            tmp_path / "packed",
            {"a": rows, "b": rows},
            start_id=9,
            end_id=9,
            vocab_size=10,
            size_limit=900,
            compression=compression,
        )
    manifest = DatasetManifest.load(data)
    remote = f"s3://bucket/round-trip-{compression}"
    upload(data, remote)
    arguments = (remote, "train", ",".join(manifest.domains), str(tmp_path / "rows.npy"))
    completed = run_script("-c", READ, *arguments, LOCAL_WORLD_SIZE="1")
    assert completed.returncode == 0, completed.stderr
    own = [
        row["tokens"]
        for domain in manifest.domains
        for shard in shards_of(data, manifest, "train", domain)
        for row in read_sequences(shard)
    ]
    assert np.array_equal(np.load(tmp_path / "rows.npy"), np.stack(own))
