"""Shards: read as streaming reads them, verified once per machine, refused by name if damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from data_prep.format import DatasetManifest
from nextpt.base.errors import ConfigError, DataError
from nextpt.base.files import sha256_file
from nextpt.data.index import ShardFile
from nextpt.data.loader import Loader
from nextpt.data.remote import describe_mismatch
from nextpt.data.scratch import ScratchFolder
from nextpt.data.sequences import MAPS
from tests.support.datasets import tiny
from tests.support.layouts import edit_index, rewrite, samples_of, sequences_of, store_of


@pytest.fixture(scope="module")
def grouped(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewrite(dataset, tmp_path_factory.mktemp("grouped") / "d")


@pytest.fixture(scope="module")
def packed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewrite(dataset, tmp_path_factory.mktemp("packed") / "d", compression="zstd:3")


@pytest.fixture
def copy(grouped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(grouped, tmp_path / "d"))


@pytest.fixture
def packed_copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "d"))


def shard(folder: Path, suffix: str = "") -> Path:
    return folder / "train" / "code" / "g00000" / f"shard.00000.mds{suffix}"


def first_row(folder: Path, scratch: Path | None = None) -> Any:
    return sequences_of(folder, "train", "code", scratch)[0]


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["dataset", "grouped", "packed"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_sequences_are_what_streaming_reads(
    request: pytest.FixtureRequest, dataset: Path, layout: str, split: str, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(layout)
    for domain in ("code", "prose"):
        sequences = sequences_of(folder, split, domain, tmp_path)
        samples = list(samples_of(dataset, split, domain))
        assert len(sequences) == len(samples) > 10
        for i, sample in enumerate(samples):
            sequence = sequences[i]
            np.testing.assert_array_equal(sequence.tokens, sample["tokens"])
            np.testing.assert_array_equal(sequence.doc_lens, sample["doc_lens"])
            np.testing.assert_array_equal(sequence.doc_flags, sample["doc_flags"])
            assert sequence.domain == sample["domain"] and sequence.tokens.dtype == np.uint16
        with pytest.raises(IndexError):
            sequences[len(sequences)]


@pytest.mark.thorough
def test_the_batches_of_all_layouts_are_equal(dataset: Path, grouped: Path, packed: Path) -> None:
    """The orders follow the shards and differ; one epoch holds the same sequences."""
    batches = []
    for folder in (dataset, grouped, packed):
        loader = Loader(
            tiny(
                folder,
                Path("unused"),
                data={"mixing": {"prose": 1}},
                train={"global_batch_size": 1, "micro_batch_size": 1},
            ),
            0,
            1,
        )
        count = loader.manifest.splits["train"]["prose"].sequences
        batches.append(
            sorted(loader.step_batches(step)[0].tokens.numpy().tobytes() for step in range(count))
        )
        loader.close()
    assert batches[0] == batches[1] == batches[2]


def descriptors_below(folder: Path) -> int:
    """Number of open files of this process in a folder; others may come and go in threads."""
    paths = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            paths.append(os.readlink(descriptor))
    return sum(path.startswith(f"{folder}/") for path in paths)


@pytest.mark.thorough
def test_open_maps_and_descriptors_are_bounded(dataset: Path, tmp_path: Path) -> None:
    folder = rewrite(dataset, tmp_path / "d", shard_sequences=2)
    sequences = sequences_of(folder, "train", "code")
    shards = len(sequences._store.index)
    assert shards > 3 * MAPS
    arrays = [sequences[i].tokens for i in range(4)]
    for i in range(len(sequences)):
        sequences[i]
    maps = sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert maps <= MAPS + 2 and descriptors_below(folder) <= 1
    # Views outlive the reader's map of their shard
    assert arrays[0].tobytes() == sequences[0].tokens.tobytes()


def test_a_shard_that_is_needed_does_not_wait_behind_prefetched_ones(
    grouped: Path, tmp_path: Path
) -> None:
    sequences, busy = sequences_of(grouped, "train", "code", tmp_path), threading.Event()
    sequences._threads.submit(busy.wait)
    sequences.prepare(range(5))
    with ThreadPoolExecutor(1) as caller:
        assert (
            caller.submit(lambda: sequences[0]).result(300).tokens.tobytes()
            == sequences_of(grouped, "train", "code", tmp_path)[0].tokens.tobytes()
        )
        busy.set()
    sequences._threads.shutdown(wait=True)
    # The other shards were prepared in their turn
    assert len(list((tmp_path / "verified").iterdir())) == 5


def _damage(path: Path, change: Callable[[bytearray], bytes]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def _flip(data: bytearray) -> bytes:
    data[len(data) // 2] ^= 1
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flip, "xxh64"),
        (lambda d: d[:-1], "bytes"),
        (lambda d: d[:5], "bytes"),
        (lambda d: b"", "bytes"),
        (lambda d: d + b"x", "bytes"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(
    copy: Path, change: Callable[[bytearray], bytes], message: str
) -> None:
    _damage(shard(copy), change)
    with pytest.raises(DataError, match=rf"g00000/shard.00000.mds is damaged: .*{message}"):
        first_row(copy)


def test_a_missing_shard_is_refused_by_name(copy: Path) -> None:
    shard(copy).unlink()
    with pytest.raises(DataError, match=r"g00000/shard.00000.mds is damaged: No such file"):
        first_row(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d[0] + 1).to_bytes(1, "little") + d[1:], "sequences"),
        (lambda d: d[:4] + b"\xff\xff\xff\x7f" + d[8:], "offsets"),
        (lambda d: d + b"x", "offsets"),
        (lambda d: d[:-1], "offsets"),
        (lambda d: d.replace(b"doc_lens", b"doc_lenz"), "columns"),
        (lambda d: d.replace(b'{"column', b"{{column"), "settings"),
    ],
)
def test_an_inconsistent_shard_with_a_valid_hash_is_refused(
    copy: Path, change: Callable[[bytearray], bytes], message: str
) -> None:
    """Shards as a broken writer would make them."""
    import xxhash

    _damage(shard(copy), change)
    data = shard(copy).read_bytes()
    right = {"bytes": len(data), "hashes": {"xxh64": xxhash.xxh64_hexdigest(data)}}
    edit_index(copy, "train", "code", lambda index: index["shards"][0]["raw_data"].update(right))
    with pytest.raises(DataError, match=rf"shard.00000.mds is damaged: .*{message}"):
        first_row(copy)


@pytest.mark.parametrize(
    "name",
    [
        "../../../secret",
        "/etc/passwd",
        "g00000/../../x",
        "",
        ".",
        "g00000//shard.00000.mds",
        "a\\b",
    ],
)
@pytest.mark.parametrize("part", ["raw_data", "zip_data"])
def test_names_outside_the_folder_are_refused(packed_copy: Path, name: str, part: str) -> None:
    edit_index(
        packed_copy, "train", "code", lambda index: index["shards"][0][part].update(basename=name)
    )
    with pytest.raises(DataError, match="outside its folder"):
        first_row(packed_copy)


@pytest.mark.parametrize("level", ["file", "folder"])
def test_links_that_lead_outside_are_refused(copy: Path, tmp_path: Path, level: str) -> None:
    path = shard(copy) if level == "file" else shard(copy).parent
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"leads outside its folder, to .*elsewhere"):
        first_row(copy)


def test_a_dataset_may_itself_be_a_link(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    assert first_row(tmp_path / "link").tokens.tobytes() == first_row(copy).tokens.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["shards"][0]["raw_data"].pop("hashes"), "no xxh64 hash"),
        (lambda i: i["shards"][0].pop("samples"), "damaged: KeyError 'samples'"),
        (lambda i: i["shards"][0].update(samples=-1), "damaged"),
        (lambda i: i["shards"][0].update(samples=1), "sequences in index.json"),
        (lambda i: i["shards"].pop(), "sequences in index.json"),
        (lambda i: i.update(shards=[]), "0 sequences in index.json"),
        (lambda i: i.update(shards=["x"]), "damaged"),
        (lambda i: i["shards"][0].update(format="json"), "expected .* in mds"),
        (lambda i: i["shards"][0]["column_encodings"].__setitem__(0, "pkl"), "expected"),
        (lambda i: i.pop("shards"), "damaged"),
    ],
)
def test_an_index_of_another_format_is_refused(
    copy: Path, change: Callable[[dict], Any], message: str
) -> None:
    edit_index(copy, "train", "code", change)
    with pytest.raises(DataError, match=message):
        sequences_of(copy, "train", "code")


def test_a_changed_or_missing_index_is_refused(copy: Path) -> None:
    path = copy / "train" / "code" / "index.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(DataError, match="its hash differs"):
        sequences_of(copy, "train", "code")
    path.unlink()
    with pytest.raises(DataError, match=r"index\.json: No such file"):
        sequences_of(copy, "train", "code")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["splits"].pop("train"), "splits are validation, expected train, validation"),
        (lambda m: m["splits"]["train"].pop("code"), "splits.train has other domains than domains"),
        (lambda m: m["domains"].append("more"), "has other domains than domains"),
        (
            lambda m: m["splits"]["train"]["code"].update(sequences=-1),
            "splits.train.code.sequences: Input should be greater than or equal to 0",
        ),
        (lambda m: m.update(sequence_length=0), "sequence_length: Input should be greater than 0"),
    ],
)
def test_a_manifest_that_lacks_a_split_or_domain_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    manifest = json.loads((copy / "dataset.json").read_text())
    change(manifest)
    (copy / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"dataset\.json is damaged: .*{message}"):
        DatasetManifest.load(copy)


def test_an_index_in_any_json_layout_is_read(copy: Path) -> None:
    raw = json.loads((copy / "dataset.json").read_text())
    path = copy / "train" / "code" / "index.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=3))
    raw["splits"]["train"]["code"]["index_sha256"] = sha256_file(path)
    (copy / "dataset.json").write_text(json.dumps(raw))
    assert len(sequences_of(copy, "train", "code")) == raw["splits"]["train"]["code"]["sequences"]


def test_a_shard_is_hashed_once_per_machine_and_again_when_it_changes(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []

    def describe(path: Path, file: ShardFile) -> str | None:
        hashed.append(path)
        return describe_mismatch(path, file)

    monkeypatch.setattr("nextpt.data.store.describe_mismatch", describe)
    for _ in range(3):  # as many processes
        store_of(copy, "train", "code", tmp_path / "node").ensure_local(0)
    assert hashed == [shard(copy)]
    store_of(copy, "train", "code", tmp_path / "other machine").ensure_local(0)
    assert len(hashed) == 2
    data = shard(copy).read_bytes()
    shard(copy).write_bytes(_flip(bytearray(data)))
    with pytest.raises(DataError):
        store_of(copy, "train", "code", tmp_path / "node").ensure_local(0)
    shard(copy).write_bytes(data)
    store_of(copy, "train", "code", tmp_path / "node").ensure_local(0)


def _hold(folder: str, ready: Any) -> None:
    with ScratchFolder(folder).lock("x"):
        ready.set()
        time.sleep(600)


@pytest.mark.process
def test_a_crash_leaves_no_lock_behind(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(300)
    with ThreadPoolExecutor(1) as thread:

        def take() -> str:
            with ScratchFolder(tmp_path).lock("x"):
                return "taken"

        waiting = thread.submit(take)
        time.sleep(0.2)
        assert not waiting.done()
        os.kill(process.pid, signal.SIGKILL)
        assert waiting.result(300) == "taken"
    process.join()


def test_the_scratch_folder_must_belong_to_the_user(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match=r"data\.scratch"):
        ScratchFolder(tmp_path / "open")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.scratch"):
        ScratchFolder(tmp_path / "file")


def test_compressed_shards_are_unpacked_once_and_the_dataset_is_left_alone(
    packed: Path, tmp_path: Path
) -> None:
    before = sorted(packed.rglob("*"))
    first_row(packed, tmp_path)
    unpacked = list((tmp_path / "unpacked").rglob("*.mds"))
    assert len(unpacked) == 1 and sorted(packed.rglob("*")) == before
    first = unpacked[0].stat()
    first_row(packed, tmp_path)
    assert unpacked[0].stat().st_mtime_ns == first.st_mtime_ns
    unpacked[0].write_bytes(b"rotten")  # not the only copy: unpacked again
    first_row(packed, tmp_path)
    assert unpacked[0].stat().st_size == first.st_size


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flip, "is damaged: its xxh64"),
        (lambda d: d[:-9], "is damaged: it has"),
        (lambda d: zstandard.compress(b"\0" * 2**28), "unpacks to more than"),
        (lambda d: zstandard.compress(b"abc"), "does not unpack to the shard"),
        (lambda d: b"no zstd at all, but long enough", "cannot be unpacked"),
    ],
)
def test_damaged_compressed_shards_and_bombs_are_refused(
    packed_copy: Path, tmp_path: Path, change: Callable[[bytearray], bytes], message: str
) -> None:
    import xxhash

    path = shard(packed_copy, ".zstd")
    _damage(path, change)
    if "is damaged" not in message:  # hostile: the index has its hash
        data = path.read_bytes()
        edit_index(
            packed_copy,
            "train",
            "code",
            lambda index: index["shards"][0]["zip_data"].update(
                bytes=len(data), hashes={"xxh64": xxhash.xxh64_hexdigest(data)}
            ),
        )
    with pytest.raises(DataError, match=rf"shard.00000.mds.zstd {message}"):
        first_row(packed_copy, tmp_path / "node")
    assert not [f for f in (tmp_path / "node" / "unpacked").rglob("*") if f.is_file()]


def test_other_compressions_are_refused(packed_copy: Path) -> None:
    edit_index(
        packed_copy, "train", "code", lambda index: index["shards"][0].update(compression="br:5")
    )
    with pytest.raises(DataError, match="compression br:5 is not supported"):
        first_row(packed_copy)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_thread_is_raised_at_the_step_that_needs_it(
    copy: Path, tmp_path: Path, threads: int
) -> None:
    config = tiny(
        copy, Path("unused"), data={"prefetch_threads": threads, "scratch": str(tmp_path / "node")}
    )
    loader = Loader(config, 0, 1)
    domains, sequences = loader._order.locate(0, 8 * 60)
    needed = [set() for _ in range(60)]
    for at, (domain, sequence) in enumerate(zip(domains, sequences, strict=True)):
        starts = np.concatenate(([0], np.cumsum(loader.dataset.shard_sizes[domain])))
        needed[at // 8].add((int(domain), int(np.searchsorted(starts, sequence, side="right")) - 1))
    bad, step = next(
        (s, n)
        for n, shards in enumerate(needed)
        for s in shards
        if n > 4 and not any(s in before for before in needed[:n])
    )
    index = loader.dataset._stores["train"][bad[0]].index
    path = index.folder / index[bad[1]].raw.name
    _damage(path, _flip)
    for good in range(step):
        loader.step_batches(good)
    for _ in range(2):
        with pytest.raises(DataError, match=str(path)):
            loader.step_batches(step)
    loader.close()
