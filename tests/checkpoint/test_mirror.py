"""The mirror of a run's checkpoints, at a real S3 over HTTP behind a proxy that fails, and in folders."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from moto import settings

from nextpt.base.collective import RankGroup
from nextpt.base.errors import CheckpointError, NoValidCheckpointError, RunInUseError, StoreError
from nextpt.checkpoint import manager as manager_module
from nextpt.checkpoint.folders import steps
from nextpt.checkpoint.manager import CheckpointManager
from nextpt.checkpoint.manifest import read_manifest
from nextpt.checkpoint.mirror import retry as retry_module
from nextpt.checkpoint.mirror.archive import NOTE, Archive
from nextpt.checkpoint.mirror.mirror import Mirror
from nextpt.config import CheckpointSection
from tests.support.checkpoints import State, holds, on_ranks, write
from tests.support.file_operations import refusing
from tests.support.object_store import s3_server
from tests.support.proxy import Proxy, proxy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server("bucket") as address:
        yield address


@pytest.fixture
def link(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the store."""
    with proxy(server) as made:
        monkeypatch.setenv("S3_ENDPOINT_URL", made.address)
        yield made


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "INITIAL_BACKOFF", 0.02)
    monkeypatch.setattr(retry_module, "MAX_BACKOFF", 0.1)
    monkeypatch.setattr(retry_module, "MAX_ATTEMPTS", 2)
    monkeypatch.setattr(retry_module, "STALL_SECONDS", 5.0)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "werkzeug")  # a line for each request would hide what a failure says


class Job:
    """A job of one rank with a mirror: it starts, saves and ends."""

    def __init__(
        self,
        root: Path,
        place: str,
        ranks: RankGroup | None = None,
        may_write: Callable[[], None] = lambda: None,
        accept: Callable[[Path], None] = lambda folder: None,
        run: str = "run",
        **options: Any,
    ) -> None:
        self.root, self.ranks, self.said, self.events = root, ranks or RankGroup.world(), [], []
        section = CheckpointSection(**{"keep_last": 2} | options)
        self.mirror = Mirror(Archive(place), root, section, run, may_write, accept)
        self.manager = CheckpointManager(
            root, section, self.ranks, self.said.append, mirror=self.mirror
        )
        self.found = self.manager.resume()
        if self.ranks.rank == 0:
            self.mirror.start()

    def save(self, *which: int) -> Job:
        for step in which:
            self.manager.save(
                State(float(step), self.ranks.rank, self.ranks.world_size),
                {"step": step, "config": {}},
                {},
            )
        return self

    def end(self, seconds: float = 60.0) -> list[int]:
        """The steps that were not mirrored."""
        deadline = time.monotonic() + seconds
        left = self.mirror.finish(lambda: deadline - time.monotonic())
        self.events += self.mirror.drain_events()
        return left

    def told(self, status: str) -> list[int]:
        self.events += self.mirror.drain_events()
        return [event.step for event in self.events if event.status == status]

    def wait_for(self, status: str, step: int | None = None) -> None:
        deadline = time.monotonic() + 60
        while not any(step in (None, found) for found in self.told(status)):
            assert time.monotonic() < deadline, self.events
            time.sleep(0.01)


def whole(place: str) -> list[int]:
    """Steps of the checkpoints there, newest first. All must be whole, and nothing else there."""
    archive = Archive(place)
    stored = archive.checkpoints()
    assert [archive.problem(one) for one in stored] == [None] * len(stored) and all(
        one.complete for one in stored
    )
    known = {
        NOTE,
        *(
            f"{one.name}/{name}"
            for one in stored
            for name in [*archive.manifest(one).files, "manifest.json"]
        ),
    }
    assert set(archive.store.sizes()) <= known
    return [one.step for one in stored]


PLACES = ["s3://bucket/{}", "memory://mirrors/{}", "file://{}/mirror", "{}/mirror"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_the_run_keeps_is_there_and_comes_back(
    link: Proxy, tmp_path: Path, place: str, world_size: int
) -> None:
    place = place.format(
        tmp_path if "file" in place or place[0] == "{" else f"{tmp_path.name}-{world_size}"
    )

    def run(ranks: RankGroup) -> None:
        job = Job(tmp_path / "run", place, ranks, keep_every=3).save(1, 2, 3, 4, 5, 6)
        ranks.all_gather(None)
        assert ranks.rank or job.end() == []
        ranks.all_gather(None)

    on_ranks(world_size, run)
    assert whole(place) == [6, 5, 3]
    # One was perhaps being sent when its time came
    assert {6, 5, 3} <= set(steps(tmp_path / "run")) and len(steps(tmp_path / "run")) <= 4
    shutil.rmtree(tmp_path / "run")

    def again(ranks: RankGroup) -> None:
        job = Job(tmp_path / "run", place, ranks, keep_every=3)
        assert job.found.step == 6 and holds(job.found, 6.0)
        job.save(7)
        ranks.all_gather(None)
        assert ranks.rank or job.end() == []

    on_ranks(world_size, again)
    assert whole(place) == [7, 6, 3] and read_manifest(
        tmp_path / "run" / "step-000000007"
    ).lineage == [[1, 7]]
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize(
    "mode",
    [
        "503",
        *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("refuse", "hang", "truncate")),
    ],
)
def test_an_outage_holds_nothing_up_and_is_made_up_for(
    link: Proxy, tmp_path: Path, mode: str
) -> None:
    place = f"s3://bucket/{tmp_path.name}"
    job = Job(tmp_path / "run", place).save(1)
    job.wait_for("mirrored", 1)
    link.mode = mode
    job.save(2, 3, 4, 5, 6)
    job.wait_for("failing")
    job.save(7, 8)
    assert len(steps(tmp_path / "run")) <= 3  # two, and the one that is being sent
    link.mode = "pass"
    job.save(9)
    assert (
        job.end() == []
        and 9 in job.told("mirrored")
        and whole(place)[0] == 9
        and len(whole(place)) == 2
    )
    missed = set(range(2, 9)) - set(job.told("mirrored"))
    assert sorted(job.told("passed over")) == sorted(missed) and len(missed) >= 5
    assert len(job.told("failing")) == 1
    message = next(event.message for event in job.events if event.status == "failing")
    assert message.startswith(f"{place}: ") and "\n" not in message


def test_an_end_in_an_outage_says_what_is_missing_and_the_next_start_goes_on(
    link: Proxy, tmp_path: Path
) -> None:
    place = f"s3://bucket/{tmp_path.name}"
    job = Job(tmp_path / "run", place).save(1)
    job.wait_for("mirrored", 1)
    link.mode = "hang"
    assert job.save(2, 3).end(0.2) == [2, 3]
    link.mode = "pass"
    assert Job(tmp_path / "run", place).end() == [] and whole(place) == [3, 2]


def test_the_one_being_sent_stays(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", f"file://{tmp_path}/mirror")
    sent, go_on, write_there = threading.Event(), threading.Event(), job.mirror.archive.store.write

    def wait_in_the_middle(name: str, blocks: Iterator[bytes]) -> None:
        write_there(name, blocks)
        if name.endswith("rank-00000.safetensors"):
            sent.set()
            assert go_on.wait(60)

    job.mirror.archive.store.write = wait_in_the_middle
    job.save(1)
    assert sent.wait(60)
    job.save(2, 3, 4)
    assert steps(tmp_path / "run") == [4, 3, 1]
    go_on.set()
    job.wait_for("mirrored", 1)
    job.save(5)
    assert (
        1 not in steps(tmp_path / "run")
        and job.end() == []
        and whole(f"file://{tmp_path}/mirror") == [5, 4]
    )


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_no_half_and_the_next_start_goes_on(
    link: Proxy, tmp_path: Path
) -> None:
    place = f"s3://bucket/{tmp_path.name}"
    assert Job(tmp_path / "run", place).save(1).end() == []
    script = (
        "import sys; from pathlib import Path; from tests.checkpoint.test_mirror import Job\n"
        "job = Job(Path(sys.argv[1]), sys.argv[2]).save(2, 3)\nprint(job.end())"
    )
    link.mode = "slow"
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run"), place],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    direct = Archive(place)
    deadline = time.monotonic() + 90
    while not (half := [one for one in direct.checkpoints() if not one.complete]):
        assert time.monotonic() < deadline and child.poll() is None, child.stderr.read().decode()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()
    link.mode = "pass"
    assert half[0].step in (2, 3)
    lost = Job(tmp_path / "elsewhere", place)  # the node is gone
    assert lost.found.step == max(one.step for one in direct.checkpoints() if one.complete)
    lost.mirror.stop()
    assert Job(tmp_path / "run", place).end() == [] and whole(place) == [3, 2]


def corrupt(
    place: str,
    step: int,
    name: str,
    change: Callable[[bytes], bytes] = lambda data: data[:-1] + bytes([data[-1] ^ 1]),
) -> None:
    archive = Archive(place)
    stored = next(one for one in archive.checkpoints() if one.step == step)
    archive.store.write(
        f"{stored.name}/{name}", [change(archive.store.read(f"{stored.name}/{name}"))]
    )


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
def test_a_damaged_one_there_is_found_and_the_one_before_it_taken(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes], why: str
) -> None:
    place = f"file://{tmp_path}/mirror"
    assert Job(tmp_path / "run", place).save(1, 2, 3).end() == []
    corrupt(place, 3, name, change)
    shutil.rmtree(tmp_path / "run")
    job = Job(tmp_path / "run", place)
    assert job.found.step == 2 and holds(job.found, 2.0)
    assert any("step-000000003" in text and why in text for text in job.said)
    assert job.save(3, 4).end() == []
    assert whole(place) == [4, 3]  # the damaged one of step 3 is gone, the new one is another
    assert read_manifest(tmp_path / "run" / "step-000000003").sequence == 4


def test_a_damaged_one_there_is_sent_again_while_it_is_here(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/mirror"
    assert Job(tmp_path / "run", place).save(1, 2).end() == []
    corrupt(place, 2, "state.json")
    job = Job(tmp_path / "run", place).save(3)  # 1 may go when two others are whole
    assert job.end() == [] and whole(place) == [3, 2] and job.told("damaged") == [2]


def test_nothing_is_removed_there_while_fewer_than_two_are_whole(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/mirror"
    assert Job(tmp_path / "run", place).save(1, 2).end() == []
    corrupt(place, 2, "state.json")
    shutil.rmtree(tmp_path / "run")
    job = Job(tmp_path / "run", place)
    assert job.found.step == 1
    shutil.rmtree(tmp_path / "run" / "step-000000001")
    assert job.save(3).end() == []
    assert {one.step for one in Archive(place).checkpoints()} >= {1, 3}


def test_no_whole_one_anywhere_is_never_a_fresh_start(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/mirror"
    assert Job(tmp_path / "run", place).save(1, 2).end() == []
    corrupt(place, 1, "state.json")
    corrupt(place, 2, "state.json")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(NoValidCheckpointError, match="none is valid"):
        Job(tmp_path / "run", place)
    assert not list((tmp_path / "run").iterdir())


def test_damaged_ones_here_are_made_up_for_from_there(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/mirror"
    assert Job(tmp_path / "run", place).save(1, 2).end() == []
    for folder in (tmp_path / "run").iterdir():
        (folder / "state.json").write_text("{}")
    job = Job(tmp_path / "run", place)
    assert job.found.step == 2 and holds(job.found, 2.0) and job.end() == []


def test_the_higher_number_wins_here_or_there(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/mirror"
    assert Job(tmp_path / "a", place).save(1, 2).end() == []
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    # On another machine, with a disk of its own
    assert Job(tmp_path / "b", place).save(3).end() == []
    back = Job(tmp_path / "a", place)
    assert back.found.step == 3 and steps(tmp_path / "a") == [3, 2, 1]
    back.mirror.stop()
    rolled = Job(tmp_path / "a", place, resume=2).save(3)  # the new line is here only for a moment
    assert (
        rolled.found.step == 2
        and rolled.end() == []
        and Job(tmp_path / "a", place).found.folder.name == "step-000000003.2"
    )
    shutil.rmtree(tmp_path / "a")
    assert read_manifest(Job(tmp_path / "a", place).found.folder).lineage == [[1, 2], [4, 4]]


def test_a_step_that_only_the_mirror_has_can_be_asked_for(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/mirror"
    assert Job(tmp_path / "run", place, keep_last=None).save(1, 2, 3).end() == []
    shutil.rmtree(tmp_path / "run" / "step-000000001")
    assert Job(tmp_path / "run", place, resume=1).found.step == 1
    with pytest.raises(CheckpointError, match="has no checkpoint of that step"):
        Job(tmp_path / "run", place, resume=7)
    with pytest.raises(CheckpointError, match="never, but the mirror .* holds checkpoints"):
        Job(tmp_path / "new", place, resume="never")


def test_a_job_that_lost_the_run_folder_stops_mirroring(tmp_path: Path) -> None:
    place, lost = f"file://{tmp_path}/mirror", []

    def may_write() -> None:
        if lost:
            raise RunInUseError("taken over")

    job = Job(tmp_path / "run", place, may_write=may_write).save(1)
    job.wait_for("mirrored", 1)
    lost.append(1)
    assert job.save(2).end() == [2] and job.told("ended") and whole(place) == [1]


def test_a_job_that_lost_the_mirror_stops_mirroring(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/mirror"
    first = Job(tmp_path / "a", place).save(1)
    first.wait_for("mirrored", 1)
    second = Job(tmp_path / "b", place)
    assert second.found.step == 1
    assert first.save(2).end() == [2] and "taken over" in first.events[-1].message
    assert second.save(2, 3).end() == [] and whole(place) == [3, 2]


def test_a_damaged_one_here_is_not_mirrored(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/mirror"
    write(tmp_path / "run", 1)
    path = write(tmp_path / "run", 2, lineage=[[1, 1]]) / "state.json"
    mirror = Mirror(Archive(place), tmp_path / "run", CheckpointSection(), "run")
    path.write_text(path.read_text().replace("2", "3"))
    mirror.start()
    deadline = time.monotonic() + 60
    assert mirror.finish(lambda: deadline - time.monotonic()) == [] and whole(place) == [1]
    assert [event.message for event in mirror.drain_events() if event.status == "passed over"] == [
        f"{tmp_path}/run/step-000000002 is not mirrored: state.json is not what its manifest says"
    ]


def test_mistakes_are_told_at_the_start(
    link: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="expected a path, s3://"):
        Archive("nosuch://bucket/run")
    with pytest.raises(
        CheckpointError, match="checkpoint.mirror: s3://nowhere/run: there is no such bucket"
    ):
        Job(tmp_path / "run", "s3://nowhere/run")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="checkpoint.mirror: .*file/x"):
        Job(tmp_path / "run", f"{tmp_path}/file/x")
    place = f"s3://bucket/{tmp_path.name}"
    Job(tmp_path / "run", place, run="one").save(1).end()
    with pytest.raises(CheckpointError, match="holds the run 'one', and this one is 'two'"):
        Job(tmp_path / "other", place, run="two")
    link.mode = "refuse"
    with pytest.raises(
        CheckpointError,
        match="cannot be reached.*does not start from nothing while the mirror may have some",
    ):
        Job(tmp_path / "empty", place, run="one")
    assert not (tmp_path / "empty").exists()
    monkeypatch.setattr(retry_module, "STALL_SECONDS", 0.5)
    link.mode = "hang"
    with pytest.raises(CheckpointError, match="no answer in 0.5 s.*does not start from nothing"):
        Job(tmp_path / "empty", place, run="one")
    monkeypatch.setattr(retry_module, "STALL_SECONDS", 5.0)
    link.mode = "503"
    job = Job(tmp_path / "run", place, run="one")
    assert job.found.step == 1 and "training goes on from" in job.said[0]
    job.save(2)
    job.wait_for("failing")
    link.mode = "pass"
    assert job.end() == [] and whole(place) == [2, 1]


def test_missing_credentials_are_told_at_the_start(
    link: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From now on the server knows nobody
    monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
    with pytest.raises(
        CheckpointError,
        match="checkpoint.mirror: s3://bucket/.*: the store refuses these credentials",
    ):
        Job(tmp_path / "run", f"s3://bucket/{tmp_path.name}")


def test_a_checkpoint_of_another_run_is_refused_before_it_has_a_name(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/mirror"
    assert Job(tmp_path / "run", place).save(1).end() == []

    def accept(folder: Path) -> None:
        assert json.loads((folder / "state.json").read_text())["step"] == 1
        raise CheckpointError("it is of another run")

    with pytest.raises(CheckpointError, match="cannot be fetched .* it is of another run"):
        Job(tmp_path / "other", place, accept=accept)
    assert not list((tmp_path / "other").iterdir())


def test_a_disk_that_is_full_when_coming_back_leaves_nothing(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/mirror"
    assert Job(tmp_path / "run", place).save(1).end() == []
    with (
        refusing(r"staging-fetch.*safetensors", 28),
        pytest.raises(CheckpointError, match="No space left on device"),
    ):
        Job(tmp_path / "other", place)
    assert not list((tmp_path / "other").iterdir())


def test_answers_cut_short_when_coming_back_leave_nothing(
    link: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"s3://bucket/{tmp_path.name}"
    assert Job(tmp_path / "run", place).save(1).end() == []
    fetch_there = manager_module.fetch

    def cut(*arguments: Any) -> str | None:
        link.mode = "truncate"
        return fetch_there(*arguments)

    monkeypatch.setattr(manager_module, "fetch", cut)
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        Job(tmp_path / "other", place)
    assert not list((tmp_path / "other").iterdir())
    monkeypatch.undo()
    link.mode = "pass"
    monkeypatch.setenv("S3_ENDPOINT_URL", link.address)
    assert Job(tmp_path / "other", place).found.step == 1


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))]
)
def test_two_whole_ones_are_there_at_every_instant_once_there_were_two(
    tmp_path: Path, seed: int
) -> None:
    """Over saves, rollbacks, lost disks, starts and damage there that leaves two, in any order.

    Looked at before each removal.
    """
    chance, place, step, had_two = random.Random(seed), f"file://{tmp_path}/mirror", 0, False

    def now_whole(without: str = "") -> int:
        archive = Archive(place)
        return sum(
            one.complete and archive.problem(one) is None
            for one in archive.checkpoints()
            if one.name != without
        )

    def watched(job: Job) -> Job:
        remove_there = job.mirror.archive.store.remove

        def remove(name: str) -> None:
            counts.append(now_whole(name.partition("/")[0]))
            remove_there(name)

        job.mirror.archive.store.remove = remove
        return job

    counts: list[int] = []
    for _ in range(12):
        if had_two and chance.random() < 0.3:
            shutil.rmtree(tmp_path / "run")
        resume = (
            chance.choice(steps(tmp_path / "run"))
            if (tmp_path / "run").exists() and chance.random() < 0.2
            else "auto"
        )
        job = watched(
            Job(tmp_path / "run", place, keep_every=chance.choice([None, 3]), resume=resume)
        )
        step = job.found.step if job.found else 0
        for _ in range(chance.randint(1, 3)):
            step += 1
            job.save(step)
        assert job.end() == []
        assert now_whole() >= 2 or not had_two
        had_two = had_two or now_whole() >= 2
        stored = [one for one in Archive(place).checkpoints() if one.complete]
        if len(stored) > 2 and now_whole() > 2:
            victim = Archive(place).store.path(f"{chance.choice(stored).name}/state.json")
            Path(victim).write_text("{}")
    assert counts and min(counts) >= 2


def test_a_damaged_one_there_stays_till_two_are_whole(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/mirror"
    assert Job(tmp_path / "run", place).save(1, 2).end() == []
    corrupt(place, 1, "manifest.json", lambda data: data[:-1])
    shutil.rmtree(tmp_path / "run" / "step-000000001")
    job = Job(tmp_path / "run", place)
    job.wait_for("damaged", 1)
    assert job.end() == [] and [one.step for one in Archive(place).checkpoints()] == [2, 1]
    assert Job(tmp_path / "run", place).save(3).end() == [] and whole(place) == [3, 2]


def test_what_a_store_keeps_wrongly_is_noticed_before_it_counts(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/mirror"
    job = Job(tmp_path / "run", place)
    store, wrong = job.mirror.archive.store, ["state.json", "manifest.json"]
    write_there = store.write

    def write_wrongly(name: str, blocks: Iterator[bytes]) -> None:
        data = b"".join(blocks)
        if name.rpartition("/")[2] in wrong:
            wrong.remove(name.rpartition("/")[2])
            data = data.replace(b"1", b"2")
        write_there(name, [data])

    store.write = write_wrongly
    assert job.save(1).end() == [] and wrong == [] and whole(place) == [1]
    (failing,) = [event.message for event in job.events if event.status == "failing"]
    assert "state.json does not hold what was sent" in failing
