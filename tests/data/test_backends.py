"""mosaicml-streaming as the reader and as an oracle: both backends give the same samples."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.streaming_compat import import_streaming
from nextpt.base.errors import ConfigError, DataError
from nextpt.data.loader import Loader
from nextpt.data.streaming_backend import shared_memory_lock
from tests.support.commands import start_script
from tests.support.datasets import tiny
from tests.support.layouts import rewrite, sequences_of


@pytest.fixture(scope="module")
def packed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewrite(
        dataset, tmp_path_factory.mktemp("packed") / "d", compression="zstd", shard_sequences=40
    )


@pytest.fixture(scope="module")
def grouped(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewrite(dataset, tmp_path_factory.mktemp("grouped") / "d", shard_sequences=40)


@pytest.fixture(autouse=True)
def leave_no_shared_memory() -> Iterator[None]:
    """StreamingDataset refuses a folder that another instance of the process still uses."""
    import gc

    yield
    gc.collect()


def open_loader(path: Path, backend: str, **data: Any) -> Loader:
    stages = [{"steps": 9, "mixing": {"code": 0.4, "prose": 0.6}}, {"sequence_length": 16}]
    return Loader(
        tiny(
            path,
            Path("unused"),
            data={"backend": backend, "stages": stages} | data,
            train={"steps": 40},
        ),
        0,
        1,
    )


def batches(loader: Loader) -> list[dict[str, torch.Tensor]]:
    tensors = [vars(b) for step in range(20) for b in loader.step_batches(step)]
    tensors += [vars(b) for domain in (0, 1) for b in loader.validation_batches(domain, 5)]
    loader.close()
    return tensors


def assert_equal(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> None:
    assert len(a) == len(b) > 80
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["dataset", "grouped", "packed"])
def test_both_backends_give_the_same_batches(
    request: pytest.FixtureRequest, layout: str, tmp_path: Path
) -> None:
    # Streaming unpacks beside the packed shards
    folder = Path(shutil.copytree(request.getfixturevalue(layout), tmp_path / "d"))
    expected = batches(open_loader(folder, "native"))
    assert_equal(batches(open_loader(folder, "streaming")), expected)
    assert_equal(batches(open_loader(folder, "native")), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["grouped", "packed"])
def test_both_backends_read_a_remote_dataset(
    request: pytest.FixtureRequest, layout: str, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(layout)
    expected = batches(open_loader(folder, "native"))
    assert_equal(
        batches(open_loader(tmp_path / "a", "streaming", remote=str(folder), cache_limit_gib=1)),
        expected,
    )
    # With the copies of the other backend
    assert_equal(batches(open_loader(tmp_path / "a", "native", remote=str(folder))), expected)


@pytest.mark.thorough
def test_states_are_the_same_for_both_backends(dataset: Path) -> None:
    native, streaming = (open_loader(dataset, backend) for backend in ("native", "streaming"))
    streaming.check_state(native.state(7))
    assert native.state(7) == streaming.state(7)
    native.close(), streaming.close()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("reader", "layout"),
    [
        ("StreamingDataset", "dataset"),
        ("StreamingDataset", "grouped"),
        ("StreamingDataset", "packed"),
        ("LocalDataset", "dataset"),
        ("LocalDataset", "grouped"),  # which does not unpack
    ],
)
def test_streamings_own_iteration_yields_our_sequences_sample_for_sample(
    request: pytest.FixtureRequest, layout: str, reader: str, tmp_path: Path
) -> None:
    import_streaming()
    import streaming

    source = request.getfixturevalue(layout)
    ours = sequences_of(source, "train", "prose", tmp_path / "node")
    folder = str(shutil.copytree(source / "train" / "prose", tmp_path / "d"))
    if reader == "LocalDataset":
        local = streaming.LocalDataset(local=folder)
        theirs = [local[i] for i in range(len(local))]
    else:
        theirs = list(
            streaming.StreamingDataset(
                local=folder, shuffle=False, batch_size=1, num_canonical_nodes=1
            )
        )
    assert len(theirs) == len(ours)
    for i, sample in enumerate(theirs):
        sequence = ours[i]
        assert sample["tokens"].tobytes() == sequence.tokens.tobytes()
        np.testing.assert_array_equal(sample["doc_lens"], sequence.doc_lens)
        np.testing.assert_array_equal(sample["doc_flags"], sequence.doc_flags)


@pytest.mark.thorough
def test_a_shuffled_epoch_of_streaming_is_an_epoch_of_ours(grouped: Path, tmp_path: Path) -> None:
    """Equal as multisets: the orders are different functions."""
    import_streaming()
    from streaming import StreamingDataset

    folder = str(shutil.copytree(grouped / "train" / "prose", tmp_path / "d"))
    theirs = StreamingDataset(
        local=folder,
        shuffle=True,
        shuffle_algo="py1e",
        shuffle_seed=1,
        shuffle_block_size=2**18,
        batch_size=4,
        num_canonical_nodes=1,
    )
    loader = Loader(
        tiny(
            grouped,
            Path("unused"),
            data={"mixing": {"prose": 1}},
            train={"global_batch_size": 1, "micro_batch_size": 1},
        ),
        0,
        1,
    )
    sequences, read = loader._order.locate(0, len(theirs))[1], loader.dataset.sequences["train"][1]
    assert sorted(s["tokens"].tobytes() for s in theirs) == sorted(
        read[int(r)].tokens.tobytes() for r in sequences
    )
    loader.close()


@pytest.mark.thorough
def test_a_limit_that_would_delete_the_only_copy_is_refused(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "d"))
    with pytest.raises(ConfigError, match="the only copy"):
        open_loader(folder, "streaming", cache_limit_gib=1)


@pytest.mark.thorough
def test_the_library_path_also_refuses_damaged_shards_by_name(
    grouped: Path, packed: Path, tmp_path: Path
) -> None:
    """Streaming never checks the hash of an existing file."""
    for name, source, pattern in (("grouped", grouped, "*.mds"), ("packed", packed, "*.zstd")):
        folder = Path(shutil.copytree(source, tmp_path / name))
        for shard in folder.rglob(pattern):
            shard.write_bytes(shard.read_bytes()[:-3] + b"rot")
        loader = open_loader(folder, "streaming")
        with pytest.raises(DataError, match=r"g\d{5}/shard.\d{5}.mds"):
            loader.step_batches(0)
        loader.close()
        del loader


@pytest.mark.thorough
def test_the_library_path_fetches_damaged_copies_again(grouped: Path, tmp_path: Path) -> None:
    expected = batches(open_loader(tmp_path / "a", "streaming", remote=str(grouped)))
    for shard in (tmp_path / "a").rglob("*.mds"):
        shard.write_bytes(shard.read_bytes()[:-3] + b"rot")
    assert_equal(batches(open_loader(tmp_path / "a", "streaming", remote=str(grouped))), expected)


@pytest.mark.process
def test_local_world_size_is_set_before_streaming_needs_it(dataset: Path, tmp_path: Path) -> None:
    """Deepspeed sets LOCAL_SIZE only.

    Without LOCAL_WORLD_SIZE, each rank would act as the first of its machine.
    """
    script = (
        "import os, sys\nfrom data_prep.streaming_compat import"
        " import_streaming\nimport_streaming()\nfrom streaming.base.world import World\nw ="
        " World.detect()\nprint(w.ranks_per_node, w.is_local_leader)"
    )
    environment = os.environ | {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
    }
    environment["LOCAL_WORLD_SIZE"] = "1"  # of a parent that used streaming itself
    completed = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert completed.stdout.split() == ["2", "False"], completed.stderr


def test_a_full_folder_of_shared_memory_is_named(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel would kill the process without a word."""
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("nextpt.data.streaming_backend.shutil.disk_usage", lambda _: usage(8192))
    with pytest.raises(ConfigError, match=r"/dev/shm has 8192 bytes left, data\.backend=streaming"):
        open_loader(dataset, "streaming")
    open_loader(dataset, "native").close()


def test_jobs_of_a_machine_create_shared_memory_one_after_the_other(tmp_path: Path) -> None:
    """StreamingDataset looks for a free number and takes it later, when another may have it."""
    inside, overlaps = threading.Event(), []

    def job(_: int) -> None:
        with shared_memory_lock(tmp_path):
            overlaps.append(inside.is_set())
            inside.set()
            time.sleep(0.02)
            inside.clear()

    with ThreadPoolExecutor(4) as jobs:
        list(jobs.map(job, range(8)))
    assert overlaps == [False] * 8


def test_a_job_that_cannot_have_the_lock_goes_on(tmp_path: Path) -> None:
    with shared_memory_lock(tmp_path), shared_memory_lock(tmp_path, seconds=0.1):
        pass
    with shared_memory_lock(tmp_path / "none"):
        pass


@pytest.mark.process
@pytest.mark.slow
def test_jobs_that_start_at_once_open_their_datasets(dataset: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom nextpt.data.loader import Loader\n"
        "from tests.support.datasets import tiny\n"
        "config = tiny(Path(sys.argv[1]), Path('unused'), data={'backend': 'streaming'})\n"
        "for _ in range(8):\n    Loader(config, 0, 1).close()\n"
    )
    jobs = []
    for number in range(4):
        copy = shutil.copytree(dataset, tmp_path / str(number))
        jobs.append(start_script("-c", script, str(copy), TMPDIR=str(tmp_path)))
    for job in jobs:
        errors = "".join(job.communicate(timeout=600))
        assert job.returncode == 0, errors
