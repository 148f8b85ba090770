"""Records of a run folder that are damaged: treated as unreadable, and no reason to wait."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.work import Stage, _is_dead, advanced
from launcher.jobs.local import _recorded_code
from nextpt.base.errors import EXIT_CRASHED
from nextpt.base.processes import process_identity
from nextpt.config import to_yaml
from nextpt.job.environment import read_starts, record_start
from nextpt.job.exit_record import read_exit_record, write_exit_record
from nextpt.job.watchdog import Watchdog
from tests.support.datasets import tiny
from tests.support.file_operations import full_disk

CONTENTS = {
    "empty": b"",
    "half": b'{"starts": [{"time"',
    "not UTF-8": b'{"code": "\xff"}',
    "nested": b"[" * 200_000,
    "a list": b"[1]",
    "a number": b"7",
    "null": b"null",
    "values": b'{"starts": [3], "code": "1", "advanced": [], "pid": "x", "host": 3}',
    "a huge number": b'{"starts": 1e400, "code": 1e400}',
}
START = {
    "time": 1e9,
    "first_step": 1,
    "hosts": {"a": 1},
    "devices": {"b": 1},
    "versions": {},
    "host_memory_bytes": 2**30,
}


@pytest.fixture(params=[*CONTENTS, "a pipe", "a link to nothing", "a folder"])
def damage(request: pytest.FixtureRequest) -> Any:
    """Writes what the parameter names at a path."""

    def write(path: Path) -> None:
        if request.param == "a pipe":
            os.mkfifo(path)
        elif request.param == "a folder":
            path.mkdir()
        elif request.param == "a link to nothing":
            path.symlink_to("nowhere")
        else:
            path.write_bytes(CONTENTS[request.param])

    return write


def test_a_damaged_environment_record_is_renamed(
    tmp_path: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(tmp_path / "environment.json")
    assert read_starts(tmp_path) == []
    record_start(tmp_path, START)
    record_start(tmp_path, START | {"first_step": 5})
    assert [start["first_step"] for start in read_starts(tmp_path)] == [1, 5]
    assert os.path.lexists(tmp_path / "environment.json.damaged")
    message = capsys.readouterr().err
    assert message.startswith(f"warning: {tmp_path}/environment.json is unreadable (")
    assert message.count("\n") == 1


def test_a_damaged_exit_record_is_none(tmp_path: Path, damage: Any) -> None:
    damage(tmp_path / "exit.json")
    assert read_exit_record(tmp_path) is None


def test_an_exit_that_a_full_disk_refuses_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nextpt.job.exit_record.PAUSE", 0.0)
    with full_disk():
        write_exit_record(tmp_path, 0, "finished", 3)
    assert capsys.readouterr().err == (
        f"warning: the end of this job is not recorded: {tmp_path}/exit.json: File too large; free"
        " some space\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_complete_run_whose_end_a_full_disk_refused_is_a_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path / "data", tmp_path, train={"steps": 6})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    for step, code in ((5, EXIT_CRASHED), (6, 0)):
        (tmp_path / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
        assert _recorded_code(tmp_path) == code
    assert capsys.readouterr().err.count("training left no exit record") == 1
    (tmp_path / "config.yaml").write_text("train: [")
    assert _recorded_code(tmp_path) == EXIT_CRASHED


def test_a_damaged_lease_is_dead_after_a_silence(tmp_path: Path, damage: Any) -> None:
    (tmp_path / "leases").mkdir()
    path = tmp_path / "leases" / "pack-3"
    damage(path)
    assert not _is_dead(path)
    os.utime(path, (0, 0), follow_symlinks=False)
    assert _is_dead(path)
    (tmp_path / "leases" / "pack-x").touch()
    stage = Stage("pack", [1] * 4, lambda item: False, lambda item, report: None)
    assert advanced(stage, tmp_path, {3}) == 0
    path.rmdir() if path.is_dir() else path.unlink()
    path.write_text(json.dumps(process_identity() | {"advanced": 7}))
    assert not _is_dead(path) and advanced(stage, tmp_path, {3}) == 1


def test_a_damaged_report_of_a_rank_is_silence(tmp_path: Path, damage: Any) -> None:
    watchdog = Watchdog(tmp_path, 0, ["a", "b"], 60.0)
    (tmp_path / "stacks").mkdir()
    damage(tmp_path / "stacks" / "rank-1.json")
    watchdog._write_report(expired=True)
    assert list(watchdog._read_reports()) == [0]
    watchdog.close()
