"""Verification of a dataset's files: in every job, and nothing that rots is trained on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nextpt.base.errors import DataError
from nextpt.data.dataset import open_sequences
from nextpt.data.loader import Loader
from nextpt.data.sequences import load_manifest, load_token_bytes
from tests.support.datasets import tiny
from tests.support.layouts import rewrite, store_of


@pytest.fixture(scope="module")
def grouped(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewrite(dataset, tmp_path_factory.mktemp("grouped") / "d")


@pytest.fixture
def copy(grouped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(grouped, tmp_path / "d"))


def shard(folder: Path) -> Path:
    return folder / "train" / "code" / "g00000" / "shard.00000.mds"


def _rot(path: Path) -> None:
    """Flip a bit of a file, as a failing disk does: its times stay."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("backend", ["native", "streaming"])
def test_a_shard_that_rots_after_a_job_is_refused_by_the_next(
    copy: Path, tmp_path: Path, backend: str
) -> None:
    """Unless data.verify says that each machine verifies it once."""

    def read(verify: str, job_start: float) -> None:
        data = {"scratch": str(tmp_path / "node"), "verify": verify, "backend": backend}
        loader = Loader(tiny(copy, Path("unused"), data=data), 0, 1, job_start=job_start)
        try:
            for source in loader.dataset.sequences["train"]:
                source[0]
        finally:
            loader.close()

    read("job", time.time())
    _rot(shard(copy))
    read("machine", time.time())
    with pytest.raises(DataError, match=r"g00000/shard.00000.mds is damaged: its xxh64 differs"):
        read("job", time.time())


def test_commands_that_read_a_dataset_verify_its_shards(copy: Path) -> None:
    open_sequences(copy, "train")["code"][0]
    _rot(shard(copy))
    with pytest.raises(DataError, match="xxh64"):
        open_sequences(copy, "train")["code"][0]


def test_all_ranks_of_a_job_verify_a_shard_once(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    monkeypatch.setattr(
        "nextpt.data.store.describe_mismatch", lambda path, file: hashed.append(path)
    )
    start = time.time()
    for _ in range(3):
        store = store_of(copy, "train", "code", tmp_path)
        store.verified_since = start
        store.ensure_local(0)
    assert len(hashed) == 1
    marker = store.scratch.verified_marker(shard(copy), store.index[0].raw.xxh64)
    for content in ("", "soon", repr(start - 1)):
        marker.write_text(content)
        store.ensure_local(0)
    assert len(hashed) == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "its hash is not the one in dataset.json"),
        (lambda data: data.replace(b"<u2", b"<i2"), "expected unsigned integers"),
        (lambda data: data[:100], "cannot be read"),
        (lambda data: b"", "cannot be read"),
    ],
)
def test_a_damaged_table_of_bytes_is_refused(
    copy: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    """Bits per byte would be wrong without a word."""
    path = copy / "token_bytes.npy"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"token_bytes\.npy .*{message}"):
        Loader(tiny(copy, Path("unused")), 0, 1)


def test_a_table_of_bytes_that_claims_a_huge_size_takes_no_memory(tmp_path: Path) -> None:
    with open(tmp_path / "token_bytes.npy", "wb") as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": (2**45,)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(DataError, match="cannot be read"):
        load_token_bytes(tmp_path, 2**45)


def test_a_dataset_without_a_hash_of_its_table_is_read(copy: Path) -> None:
    """As written before 2026-12; the fingerprint does not depend on the field."""
    before = load_manifest(copy)
    raw = json.loads((copy / "dataset.json").read_text())
    del raw["token_bytes_sha256"]
    (copy / "dataset.json").write_text(json.dumps(raw))
    assert load_manifest(copy).token_bytes_sha256 is None
    assert load_manifest(copy).content_sha256() == before.content_sha256()
    Loader(tiny(copy, Path("unused")), 0, 1).close()
