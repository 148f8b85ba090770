"""Crash safety: killed at any instant and restarted, a preparation writes the same bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from data_prep.spec import PrepSpec
from data_prep.streaming_compat import import_streaming
from data_prep.work import _lease
from data_prep.workers import LocalWorkers
from tests.support.commands import ROOT, Command, start_script
from tests.support.forked import run_in_child
from tests.support.prep_worlds import content, small_units, world

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def world_spec(tmp_path_factory: pytest.TempPathFactory) -> PrepSpec:
    import_streaming()
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def expected(world_spec: PrepSpec) -> dict[str, str]:
    """Content of an undisturbed preparation."""
    spec = world_spec.model_copy(update={"output": world_spec.output.with_name("undisturbed")})
    with small_units():
        prepare(spec, workers=LocalWorkers(1))
    return content(spec.output)


def killed_at(spec: PrepSpec, rename: int, *, after: bool) -> bool:
    """Prepare in a child that is killed right before or after its n-th rename.

    Returns False if it needed fewer.
    """

    def action() -> None:
        renames = 0

        def wrap(original: Callable[..., None]) -> Callable[..., None]:
            def renamed(*arguments: object) -> None:
                nonlocal renames
                renames += 1
                if renames == rename and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                original(*arguments)
                if renames == rename:
                    os.kill(os.getpid(), signal.SIGKILL)

            return renamed

        os.replace, os.rename = wrap(os.replace), wrap(os.rename)
        with small_units():
            prepare(spec, workers=LocalWorkers(1))

    return run_in_child(action) == -signal.SIGKILL


def finish(spec: PrepSpec) -> None:
    def action() -> None:
        with small_units():
            prepare(spec, workers=LocalWorkers(1))

    assert run_in_child(action) == 0


def test_there_are_many_steps(expected: dict[str, str]) -> None:
    assert sum(name.endswith(".mds") for name in expected) >= 8


@pytest.mark.parametrize("step", [1, 4, 13, 30, 47])
def test_killed_at_a_rename_and_started_again(
    world_spec: PrepSpec, expected: dict[str, str], tmp_path: Path, step: int
) -> None:
    spec = world_spec.model_copy(update={"output": tmp_path / "out"})
    killed_at(spec, step, after=step % 2 == 0)
    finish(spec)
    assert content(spec.output) == expected and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_killed_at_every_rename(
    world_spec: PrepSpec, expected: dict[str, str], tmp_path: Path
) -> None:
    """At each rename: before odd ones, after even ones."""
    for step in count(1):
        spec = world_spec.model_copy(update={"output": tmp_path / str(step) / "out"})
        spec.output.parent.mkdir()
        if not killed_at(spec, step, after=step % 2 == 0):
            break
        finish(spec)
        assert content(spec.output) == expected, step
    assert step > 40


def test_finished_units_are_not_done_again(
    world_spec: PrepSpec, expected: dict[str, str], tmp_path: Path
) -> None:
    spec = world_spec.model_copy(update={"output": tmp_path / "out"})
    assert killed_at(spec, 14, after=True)
    times = {p: p.stat().st_mtime_ns for p in (spec.work / "tok").glob("*.tok")}
    assert len(times) >= 2
    assert killed_at(spec, 12, after=True)  # further on
    assert {p: p.stat().st_mtime_ns for p in times} == times
    finish(spec)
    assert content(spec.output) == expected


def test_a_lease_can_be_read_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker may be killed while it renews the lease.

    An unreadable lease is waited for until it expires.
    """
    monkeypatch.setattr("data_prep.work.HEARTBEAT", 0.0)
    with _lease(tmp_path, "pack-0") as lease:
        assert lease is not None
        counts = set()
        deadline = time.monotonic() + 600
        while len(counts) < 500 and time.monotonic() < deadline:
            lease.advance(1)
            counts.add(json.loads((tmp_path / "leases" / "pack-0").read_text())["advanced"])
    assert len(counts) == 500


@pytest.mark.parametrize("links", [True, False])
def test_a_lease_is_created_with_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Killed before it has one, a worker leaves nothing that others wait for."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    with _lease(tmp_path, "pack-0") as lease, _lease(tmp_path, "pack-0") as second:
        assert lease is not None and second is None
        assert json.loads((tmp_path / "leases" / "pack-0").read_text())["pid"] == os.getpid()
    assert not list((tmp_path / "leases").iterdir())
    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(KeyboardInterrupt), _lease(tmp_path, "pack-0"):
        pass
    assert not list((tmp_path / "leases").iterdir())


DRIVER = """
import os, sys, time
from contextlib import suppress
from pathlib import Path
import data_prep.plan, data_prep.layout, data_prep.duplicates, data_prep.work
data_prep.plan.UNIT_BYTES, data_prep.layout.GROUP_TOKENS = 20_000, 8_000
data_prep.duplicates.PARTITION = 50
from data_prep.prepare import prepare
from data_prep.spec import PrepSpec
from data_prep.workers import LocalWorkers
run = data_prep.work._run
def wait_in_the_first_unit(stage, *arguments):
    with suppress(FileExistsError):
        if stage.name == "tokenize":
            with open(os.environ["VICTIM"], "x") as file:
                print(os.getpid(), file=file, flush=True)
                time.sleep(600)
    run(stage, *arguments)
if "VICTIM" in os.environ:
    data_prep.work._run = wait_in_the_first_unit
if __name__ == "__main__":
    task, tasks, workers = map(int, sys.argv[2:])
    spec = PrepSpec.model_validate_json(Path(sys.argv[1]).read_text())
    prepare(spec, workers=LocalWorkers(workers, task, tasks), alone=tasks == 1)
"""


def start(
    tmp_path: Path, spec: PrepSpec, task: int, tasks: int, workers: int, **variables: str
) -> Command:
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    numbers = map(str, (task, tasks, workers))
    arguments = (str(tmp_path / "driver.py"), str(tmp_path / "spec.json"), *numbers)
    return start_script(*arguments, new_session=True, PYTHONPATH=str(ROOT), **variables)


def test_tasks_of_an_array_share_the_work(
    world_spec: PrepSpec, expected: dict[str, str], tmp_path: Path
) -> None:
    spec = world_spec.model_copy(update={"output": tmp_path / "out"})
    tasks = [start(tmp_path, spec, i, 3, 1) for i in range(3)]
    for task in tasks:
        _, errors = task.communicate(600)
        assert task.returncode == 0, errors
    assert content(spec.output) == expected and not spec.work.exists()


def test_a_killed_worker_s_work_goes_to_the_others(
    world_spec: PrepSpec, expected: dict[str, str], tmp_path: Path
) -> None:
    """The worker that begins first is killed in its first unit."""
    spec = world_spec.model_copy(update={"output": tmp_path / "out"})
    victim = tmp_path / "victim"
    task = start(tmp_path, spec, 0, 1, 2, VICTIM=str(victim))
    while not (victim.exists() and victim.read_text().endswith("\n")) and task.returncode is None:
        time.sleep(0.01)
    os.kill(int(victim.read_text()), signal.SIGKILL)
    _, errors = task.communicate(timeout=600)
    assert task.returncode == 0, errors
    assert "was killed" in errors and content(spec.output) == expected


def files_of(folder: Path) -> set[Path]:
    return set(folder.rglob("*")) if folder.exists() else set()


@pytest.mark.slow
def test_repeated_kills_with_other_numbers_of_workers(
    world_spec: PrepSpec, expected: dict[str, str], tmp_path: Path
) -> None:
    """Each run is killed once it has written some files more, however quick the machine is."""
    spec = world_spec.model_copy(update={"output": tmp_path / "out"})
    kills = 0
    for workers, new_files in ((2, 1), (1, 3), (3, 6), (2, 2), (4, 9), (1, 4)):
        before = files_of(spec.work)
        task = start(tmp_path, spec, 0, 1, workers)
        while task.returncode is None and len(files_of(spec.work) - before) < new_files:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(task.pid, signal.SIGKILL)
        kills += task.wait() == -signal.SIGKILL
        if (spec.output / "dataset.json").exists():  # it was not killed in time, or in its last act
            assert content(spec.output) == expected
            shutil.rmtree(spec.output)
    assert kills >= 3
    task = start(tmp_path, spec, 0, 1, 2)
    _, errors = task.communicate(timeout=600)
    assert task.returncode == 0, errors
    assert content(spec.output) == expected
