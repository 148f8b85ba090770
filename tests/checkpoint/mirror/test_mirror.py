"""Mirror of checkpoints: retention, restore, damage, user errors; S3 over HTTP and folders."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from moto import settings

from nextpt.base.collective import RankGroup
from nextpt.base.errors import CheckpointError, NoValidCheckpointError, RunInUseError, StoreError
from nextpt.checkpoint.folders import steps
from nextpt.checkpoint.manifest import read_manifest
from nextpt.checkpoint.mirror import retry as retry_module
from nextpt.checkpoint.mirror.archive import Archive
from nextpt.checkpoint.mirror.mirror import Mirror
from nextpt.config import CheckpointSection
from tests.support.checkpoints import holds, on_ranks, write
from tests.support.mirror_jobs import MirroredJob, corrupt, valid_steps
from tests.support.proxy import Proxy

URIS = ["s3://bucket/{}", "memory://mirrors/{}", "file://{}/mirror", "{}/mirror"]


@pytest.mark.thorough
@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_mirror_keeps_what_the_run_keeps_and_restores_it(
    link: Proxy, tmp_path: Path, uri: str, world_size: int
) -> None:
    uri = uri.format(
        tmp_path if "file" in uri or uri[0] == "{" else f"{tmp_path.name}-{world_size}"
    )

    def run(group: RankGroup) -> None:
        job = MirroredJob(tmp_path / "run", uri, group, keep_every=3).save(1, 2, 3, 4, 5, 6)
        group.all_gather(None)
        assert group.rank or job.end() == []
        group.all_gather(None)

    on_ranks(world_size, run)
    assert valid_steps(uri) == [6, 5, 3]
    # An upload may have been under way when its checkpoint was due for removal
    assert {6, 5, 3} <= set(steps(tmp_path / "run")) and len(steps(tmp_path / "run")) <= 4
    shutil.rmtree(tmp_path / "run")

    def restore(group: RankGroup) -> None:
        job = MirroredJob(tmp_path / "run", uri, group, keep_every=3)
        assert job.checkpoint.step == 6 and holds(job.checkpoint, 6.0)
        job.save(7)
        group.all_gather(None)
        assert group.rank or job.end() == []

    on_ranks(world_size, restore)
    assert valid_steps(uri) == [7, 6, 3] and read_manifest(
        tmp_path / "run" / "step-000000007"
    ).lineage == [[1, 7]]
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("rank-00000.safetensors", lambda d: d[:-1] + bytes([d[-1] ^ 1]), "its hash differs"),
        ("state.json", lambda d: d[:-1], "bytes, expected"),
        (
            "manifest.json",
            lambda d: d.replace(b"rank-00000.json", b"rank-00001.json"),
            "it does not have the hash that its name gives",
        ),
    ],
)
def test_a_damaged_mirrored_checkpoint_is_detected_and_the_one_before_is_used(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes], why: str
) -> None:
    uri = f"file://{tmp_path}/mirror"
    assert MirroredJob(tmp_path / "run", uri).save(1, 2, 3).end() == []
    corrupt(uri, 3, name, change)
    shutil.rmtree(tmp_path / "run")
    job = MirroredJob(tmp_path / "run", uri)
    assert job.checkpoint.step == 2 and holds(job.checkpoint, 2.0)
    assert any("step-000000003" in text and why in text for text in job.warnings)
    assert job.save(3, 4).end() == []
    assert valid_steps(uri) == [4, 3]  # the damaged copy of step 3 is gone; a new one replaced it
    assert read_manifest(tmp_path / "run" / "step-000000003").sequence == 4


def test_a_damaged_mirrored_checkpoint_is_uploaded_again_from_the_run_folder(
    tmp_path: Path,
) -> None:
    uri = f"file://{tmp_path}/mirror"
    assert MirroredJob(tmp_path / "run", uri).save(1, 2).end() == []
    corrupt(uri, 2, "state.json")
    job = MirroredJob(tmp_path / "run", uri).save(3)  # step 1 may go once two others are valid
    assert job.end() == [] and valid_steps(uri) == [3, 2] and job.steps_with("damaged") == [2]


def test_nothing_is_removed_from_the_mirror_unless_two_are_valid(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/mirror"
    assert MirroredJob(tmp_path / "run", uri).save(1, 2).end() == []
    corrupt(uri, 2, "state.json")
    shutil.rmtree(tmp_path / "run")
    job = MirroredJob(tmp_path / "run", uri)
    assert job.checkpoint.step == 1
    shutil.rmtree(tmp_path / "run" / "step-000000001")
    assert job.save(3).end() == []
    assert {checkpoint.step for checkpoint in Archive(uri).checkpoints()} >= {1, 3}


def test_no_valid_checkpoint_anywhere_is_never_a_fresh_start(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/mirror"
    assert MirroredJob(tmp_path / "run", uri).save(1, 2).end() == []
    corrupt(uri, 1, "state.json")
    corrupt(uri, 2, "state.json")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(NoValidCheckpointError, match="none is valid"):
        MirroredJob(tmp_path / "run", uri)
    assert not list((tmp_path / "run").iterdir())


def test_damaged_local_checkpoints_are_replaced_from_the_mirror(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/mirror"
    assert MirroredJob(tmp_path / "run", uri).save(1, 2).end() == []
    for folder in (tmp_path / "run").iterdir():
        (folder / "state.json").write_text("{}")
    job = MirroredJob(tmp_path / "run", uri)
    assert job.checkpoint.step == 2 and holds(job.checkpoint, 2.0) and job.end() == []


def test_the_highest_sequence_number_wins_local_or_mirrored(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/mirror"
    assert MirroredJob(tmp_path / "a", uri).save(1, 2).end() == []
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    # Another machine with its own disk
    assert MirroredJob(tmp_path / "b", uri).save(3).end() == []
    back = MirroredJob(tmp_path / "a", uri)
    assert back.checkpoint.step == 3 and steps(tmp_path / "a") == [3, 2, 1]
    back.mirror.stop()
    rolled = MirroredJob(tmp_path / "a", uri, resume=2).save(
        3
    )  # the new lineage exists in this run folder only
    assert (
        rolled.checkpoint.step == 2
        and rolled.end() == []
        and MirroredJob(tmp_path / "a", uri).checkpoint.folder.name == "step-000000003.2"
    )
    shutil.rmtree(tmp_path / "a")
    assert read_manifest(MirroredJob(tmp_path / "a", uri).checkpoint.folder).lineage == [
        [1, 2],
        [4, 4],
    ]


def test_a_step_that_only_the_mirror_has_can_be_resumed(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/mirror"
    assert MirroredJob(tmp_path / "run", uri, keep_last=None).save(1, 2, 3).end() == []
    shutil.rmtree(tmp_path / "run" / "step-000000001")
    assert MirroredJob(tmp_path / "run", uri, resume=1).checkpoint.step == 1
    with pytest.raises(CheckpointError, match="has no checkpoint of that step"):
        MirroredJob(tmp_path / "run", uri, resume=7)
    with pytest.raises(CheckpointError, match=r"never, but the mirror .* holds checkpoints"):
        MirroredJob(tmp_path / "new", uri, resume="never")


def test_a_job_that_lost_the_run_folder_stops_mirroring(tmp_path: Path) -> None:
    uri, calls = f"file://{tmp_path}/mirror", []

    def may_write() -> None:
        if calls:
            raise RunInUseError("taken over")

    job = MirroredJob(tmp_path / "run", uri, may_write=may_write).save(1)
    job.wait_until_idle()  # a round that had begun would upload files of step 2
    calls.append(1)
    assert job.save(2).end() == [2] and job.steps_with("ended") and valid_steps(uri) == [1]


def test_a_job_that_lost_the_mirror_stops_mirroring(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/mirror"
    first = MirroredJob(tmp_path / "a", uri).save(1)
    first.wait_until_idle()
    second = MirroredJob(tmp_path / "b", uri)
    assert second.checkpoint.step == 1
    assert first.save(2).end() == [2] and "taken over" in first.events[-1].message
    assert second.save(2, 3).end() == [] and valid_steps(uri) == [3, 2]


def test_a_damaged_local_checkpoint_is_not_mirrored(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/mirror"
    write(tmp_path / "run", 1)
    path = write(tmp_path / "run", 2, lineage=[[1, 1]]) / "state.json"
    mirror = Mirror(Archive(uri), tmp_path / "run", CheckpointSection(), "run")
    path.write_text(path.read_text().replace("2", "3"))
    mirror.start()
    deadline = time.monotonic() + 300
    assert mirror.finish(lambda: deadline - time.monotonic()) == [] and valid_steps(uri) == [1]
    assert [event.message for event in mirror.drain_events() if event.status == "skipped"] == [
        f"{tmp_path}/run/step-000000002 is not mirrored: state.json is not what its manifest says"
    ]


@pytest.mark.thorough
def test_user_errors_are_reported_at_the_start(
    link: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="expected a path, s3://"):
        Archive("nosuch://bucket/run")
    with pytest.raises(
        CheckpointError, match=r"checkpoint.mirror: s3://nowhere/run: there is no such bucket"
    ):
        MirroredJob(tmp_path / "run", "s3://nowhere/run")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoint.mirror: .*file/x"):
        MirroredJob(tmp_path / "run", f"{tmp_path}/file/x")
    uri = f"s3://bucket/{tmp_path.name}"
    MirroredJob(tmp_path / "run", uri, run="one").save(1).end()
    with pytest.raises(CheckpointError, match="holds the run 'one', and this one is 'two'"):
        MirroredJob(tmp_path / "other", uri, run="two")
    link.mode = "refuse"
    with pytest.raises(
        CheckpointError,
        match=r"cannot be reached.*does not start from nothing while the mirror may have some",
    ):
        MirroredJob(tmp_path / "empty", uri, run="one")
    assert not (tmp_path / "empty").exists()
    monkeypatch.setattr(retry_module, "STALL_SECONDS", 0.5)
    link.mode = "hang"
    with pytest.raises(CheckpointError, match=r"no answer in 0.5 s.*does not start from nothing"):
        MirroredJob(tmp_path / "empty", uri, run="one")
    monkeypatch.setattr(retry_module, "STALL_SECONDS", 120.0)
    link.mode = "503"
    job = MirroredJob(tmp_path / "run", uri, run="one")
    assert job.checkpoint.step == 1 and "training goes on from" in job.warnings[0]
    job.save(2)
    job.wait_for("failing")
    link.mode = "pass"
    assert job.end() == [] and valid_steps(uri) == [2, 1]


def test_missing_credentials_are_reported_at_the_start(
    link: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From now on the server rejects all credentials
    monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint.mirror: s3://bucket/.*: the store refuses these credentials",
    ):
        MirroredJob(tmp_path / "run", f"s3://bucket/{tmp_path.name}")


def test_a_checkpoint_of_another_run_is_refused_before_the_rename(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/mirror"
    assert MirroredJob(tmp_path / "run", uri).save(1).end() == []

    def accept(folder: Path) -> None:
        assert json.loads((folder / "state.json").read_text())["step"] == 1
        raise CheckpointError("it is of another run")

    with pytest.raises(CheckpointError, match=r"cannot be fetched .* it is of another run"):
        MirroredJob(tmp_path / "other", uri, accept=accept)
    assert not list((tmp_path / "other").iterdir())
