"""Hostfiles, environment files, supervision: refusals and restarts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile
from hypothesis import given
from hypothesis import strategies as st

from launcher.jobs import local
from launcher.jobs.hosts import Host, exported_variables, read_hostfile
from launcher.jobs.supervise import supervise
from nextpt.base.errors import ConfigError
from nextpt.events import StepEvent
from nextpt.job.exit_record import write_exit_record


def write(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "# two\nworker-0 slots=4\n\n10.0.0.7\tslots=16  # the big one\n  # more\nb.example.org  "
        " slots=1\n",
    )
    assert read_hostfile(path) == [
        Host("worker-0", 4),
        Host("10.0.0.7", 16),
        Host("b.example.org", 1),
    ]
    assert dict(fetch_hostfile(str(path))) == {
        host.name: host.slots for host in read_hostfile(path)
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# none\n\n", "names no host"),
        ("a slots=2\na slots=3\n", "line 2: host a is listed twice"),
        ("a slots=0\n", "line 1"),
        ("a slots=-1\n", "line 1"),
        ("a\n", "line 1: 'a' is not of the form"),
        ("a slots=2 gpus=3\n", "line 1"),
        ("a slots=two\n", "line 1"),
        ("$(touch pwned) slots=2\n", "line 1"),
        ("a;reboot slots=2\n", "line 1"),
        ("`id` slots=1\n", "line 1"),
        ("-oProxyCommand=id slots=1\n", "line 1"),
        ("a|b slots=1\n", "line 1"),
        ("a slots=99999999999999999999\n", "line 1"),
        ("x slots=1\nb&c slots=1", "line 2"),
    ],
)
def test_a_bad_hostfile_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_hostfile(write(tmp_path, text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_hostfile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_hostfile(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "binary")


@given(st.text(max_size=40))
def test_no_name_that_a_shell_or_ssh_would_act_upon_passes(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostfile-any"
    path.write_text(f"{text} slots=2\n", encoding="utf-8", errors="replace", newline="")
    try:
        names = [host.name for host in read_hostfile(path)]
    except ConfigError:
        return
    assert all(
        name[0].isascii()
        and name[0].isalnum()
        and set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        for name in names
    )


def test_variables_for_all_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    assert exported_variables() == {}
    (tmp_path / "home" / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\nA=1\n")
    (tmp_path / ".deepspeed_env").write_text("# ours\n\nA=/data/x:/y\n")
    assert exported_variables() == {"NCCL_DEBUG": "INFO", "A": "/data/x:/y"}
    for line in (
        "A=$(touch pwned)",
        "A=`id`",
        "A=x;reboot",
        'A="x"',
        "A=x y",
        "A",
        "=x",
        "1A=x",
        "A=x&",
        "A=$HOME",
    ):
        (tmp_path / ".deepspeed_env").write_text(f"B=2\n{line}\n")
        with pytest.raises(ConfigError, match="line 2"):
            exported_variables()


class Trainings:
    """Stand-in for trainings: each logs steps, may save a checkpoint, and ends with a code."""

    def __init__(self, run: Path, *ends: tuple[int, int, bool]) -> None:
        self.run, self.ends, self.starts, self.step = run, list(ends), 0, 0
        run.mkdir()

    def __call__(self) -> int:
        steps, code, saved = self.ends[min(self.starts, len(self.ends) - 1)]
        self.starts += 1
        with open(self.run / "metrics.jsonl", "a", encoding="utf-8") as file:
            for _ in range(steps):
                self.step += 1
                event = StepEvent(self.step, self.step, 1.0, 0.5, 1e-3, 2.0, 100.0)
                file.write(json.dumps(asdict(event)) + "\n")
        if saved:
            (self.run / "checkpoints" / f"step-{self.step:09d}").mkdir(parents=True)
            (self.run / "checkpoints" / f"step-{self.step:09d}" / "manifest.json").touch()
        write_exit_record(self.run, code, "a reason", self.step)
        return code


@pytest.mark.parametrize(
    ("ends", "code", "starts"),
    [
        ([(3, 0, True)], 0, 1),
        ([(3, 76, True), (3, 0, True)], 0, 2),
        ([(3, 137, False), (3, 139, False), (2, 0, False)], 0, 3),
        ([(3, 76, False)], 76, 4),
        ([(3, 1, False)], 1, 4),
        ([(0, 1, False)], 1, 1),
        ([(3, 137, True)] * 9 + [(1, 0, True)], 0, 10),
        ([(3, 2, True)], 2, 1),
        ([(3, 4, True)], 4, 1),
        ([(0, 65, False)], 65, 1),
        ([(3, 75, True)], 75, 1),
        ([(3, 130, False)], 130, 1),
        ([(3, 143, False)], 143, 1),
        ([(0, 76, False)], 76, 4),
    ],
)
def test_jobs_are_restarted_by_exit_code_and_progress(
    tmp_path: Path,
    ends: list[tuple[int, int, bool]],
    code: int,
    starts: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainings = Trainings(tmp_path / "run", *ends)
    assert supervise(trainings, tmp_path / "run", 3) == code and trainings.starts == starts
    assert capsys.readouterr().err.count("restarting from step") == starts - 1


def test_without_restarts_nothing_is_started_again(tmp_path: Path) -> None:
    trainings = Trainings(tmp_path / "run", (3, 76, True))
    assert supervise(trainings, tmp_path / "run", 0) == 76 and trainings.starts == 1


@pytest.mark.parametrize("first", ["32768\t60999", "1024\t65535", ""])
def test_ranks_get_no_port_that_the_system_gives_out_if_there_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    (tmp_path / "range").write_text(first)
    monkeypatch.setattr(local, "EPHEMERAL_PORTS", tmp_path / "range")
    assert 1024 <= local.free_port() < (32768 if first.startswith("32768") else 65536)
