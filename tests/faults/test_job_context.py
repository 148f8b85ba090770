"""Job context on real ranks: signals, second jobs, killed launchers, hangs, unequal ranks."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nextpt.base.processes import child_pids, command_line
from nextpt.checkpoint.folders import steps
from nextpt.config import to_yaml
from nextpt.events import read_events
from nextpt.job.exit_record import read_exit_record
from tests.support.commands import start_command
from tests.support.datasets import tiny
from tests.support.fork_server import ForkedPython
from tests.support.ranks import end_ranks, start_ranks

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "launcher" / "run.py")


def wait_for(condition: Callable[[], Any], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def logged_steps(run: Path) -> int:
    return max((event["step"] for event in read_events(run / "metrics.jsonl", "train")), default=0)


def write(dataset: Path, folder: Path, **sections: Any) -> list[str]:
    """A config of an endless run in folder/run, as arguments of a rank."""
    sections["train"] = {"steps": 100_000, "zero_stage": 1} | sections.get("train", {})
    (folder / "tiny.yaml").write_text(to_yaml(tiny(dataset, folder / "run", **sections)))
    return [RUN, "--config", str(folder / "tiny.yaml")]


def logs(folder: Path) -> str:
    return "\n".join(p.read_text() for p in sorted(folder.glob("rank-*.log")))


def end(processes: list[ForkedPython], seconds: float = 600) -> list[int]:
    """Exit codes of all ranks; ranks that do not end are killed (-9)."""
    return end_ranks(processes, time.monotonic() + seconds)


def send_all(ranks: list[ForkedPython], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)


def test_a_signal_to_one_rank_saves_on_all_unless_the_grace_period_is_too_short(
    dataset: Path, tmp_path: Path
) -> None:
    run, command = tmp_path / "run", write(dataset, tmp_path)
    ranks = start_ranks([command] * 2, tmp_path / "first")
    wait_for(lambda: logged_steps(run) >= 3)
    ranks[1].send_signal(signal.SIGTERM)
    assert end(ranks) == [75, 75], logs(tmp_path / "first")
    [saved] = steps(run / "checkpoints")
    record = read_exit_record(run)
    assert record["code"] == 75 and record["step"] == saved == logged_steps(run), record
    assert (
        f"stopped by SIGTERM after step {saved} (saved); to resume: python {RUN} --config"
        in logs(tmp_path / "first")
    )

    every = saved + 20
    often = [*command, f"checkpoint.every_steps={every}", "checkpoint.grace_seconds=0.00001"]
    ranks = start_ranks([often] * 2, tmp_path / "second")
    wait_for(lambda: logged_steps(run) > every)
    # Far before a step that is saved anyway
    send_all(ranks, signal.SIGSTOP)
    while not 0 < logged_steps(run) % every < every // 2:
        send_all(ranks, signal.SIGCONT)
        time.sleep(0.01)
        send_all(ranks, signal.SIGSTOP)
    send_all(ranks, signal.SIGUSR1)
    send_all(ranks, signal.SIGCONT)
    assert end(ranks) == [75, 75], logs(tmp_path / "second")
    record = read_exit_record(run)
    newest = max(steps(run / "checkpoints"))
    assert newest % every == 0 and f"the checkpoint of step {newest} is kept" in record["reason"], (
        record
    )
    assert (
        "0.0 s of checkpoint.grace_seconds = 1e-05 were left" in record["reason"]
        and record["step"] > newest
    )

    ranks = start_ranks([[*command, f"train.stop_at={record['step'] + 1}"]] * 2, tmp_path / "third")
    assert end(ranks) == [0, 0], logs(tmp_path / "third")
    assert read_exit_record(run) | {"time": 0, "host": ""} == {
        "code": 0,
        "reason": "finished",
        "step": record["step"] + 1,
        "time": 0,
        "host": "",
    }
    assert [e["step"] for e in read_events(run / "metrics.jsonl", "train")] == list(
        range(1, record["step"] + 2)
    )


def test_a_second_job_is_refused_and_no_rank_outlives_a_killed_launcher(
    dataset: Path, tmp_path: Path
) -> None:
    command = write(dataset, tmp_path)
    job = start_command("train", "--config", command[2], "--ranks", "2")
    wait_for(lambda: logged_steps(tmp_path / "run") >= 2)
    second = start_ranks([command], tmp_path / "second")
    assert end(second) == [4]
    assert f"error: run folder {tmp_path / 'run'} is in use by process" in logs(tmp_path / "second")
    assert read_exit_record(tmp_path / "run") is None and ranks_of(command[2])
    job.kill()
    job.wait()
    wait_for(lambda: not ranks_of(command[2]))


def test_nothing_outlives_a_command_that_is_killed_while_it_starts(
    dataset: Path, tmp_path: Path
) -> None:
    """The launchers below it do not look for their parent; how far it came makes no difference."""
    command = write(dataset, tmp_path)
    job = start_command("train", "--config", command[2], "--ranks", "2")
    wait_for(lambda: bool(ranks_of(command[2])))
    launchers = ranks_of(command[2])
    while not any(child_pids(int(pid)) for pid in launchers):  # the guard is started meanwhile
        time.sleep(0.01)
    for pid in launchers:  # suspended, they would stay for as long as the machine runs
        os.kill(int(pid), signal.SIGSTOP)
    job.kill()
    job.wait()
    wait_for(lambda: not ranks_of(command[2]))


def ranks_of(config: str) -> list[str]:
    """Processes of this machine whose command line names a config."""
    ranks = []
    for process in Path("/proc").iterdir():
        try:
            command = (process / "cmdline").read_bytes() if process.name.isdigit() else b""
        except OSError:
            continue
        if config.encode() in command and RUN.encode() in command:
            ranks.append(process.name)
    return ranks


def test_nextpt_train_forwards_signals_and_exit_codes(dataset: Path, tmp_path: Path) -> None:
    command = write(dataset, tmp_path)
    job = start_command("train", "--config", command[2], "--ranks", "2")
    wait_for(lambda: logged_steps(tmp_path / "run") >= 2)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=300)
    assert (
        job.returncode == 75
        and f"to resume: nextpt train --config {command[2]} --ranks 2" in errors
    ), errors[-3000:]
    assert read_exit_record(tmp_path / "run")["code"] == 75 and not ranks_of(command[2])


@pytest.mark.slow
def test_a_killed_launcher_of_deepspeed_is_not_success(dataset: Path, tmp_path: Path) -> None:
    """Deepspeed's runner exits 0 then."""
    command = write(dataset, tmp_path)
    job = start_command("train", "--config", command[2], "--ranks", "1", "--restarts", "0")
    wait_for(lambda: logged_steps(tmp_path / "run") >= 2)
    [launch] = [
        pid
        for pid in map(int, ranks_of(command[2]))
        if "deepspeed.launcher.launch" in command_line(pid)
    ]
    os.kill(launch, signal.SIGKILL)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 1 and "training left no exit record" in errors, (
        job.returncode,
        errors[-2000:],
    )
    wait_for(lambda: not ranks_of(command[2]))


def test_a_suspended_rank_is_named(dataset: Path, tmp_path: Path) -> None:
    command = [*write(dataset, tmp_path), "train.hang_seconds=5"]
    ranks = start_ranks([command] * 2, tmp_path / "logs")
    wait_for(lambda: logged_steps(tmp_path / "run") >= 5)
    ranks[1].send_signal(signal.SIGSTOP)
    assert ranks[0].wait(300) == 76, logs(tmp_path / "logs")
    ranks[1].kill()
    record = read_exit_record(tmp_path / "run")
    assert (
        record["code"] == 76
        and f"rank 1 on {os.uname().nodename} shows no sign of life" in record["reason"]
    ), record
    # The line depends on the instant of the stop
    stacks = (tmp_path / "run" / "stacks" / "rank-0.txt").read_text()
    assert re.search(
        r"^rank 0 on .*, at (batches|vote on batches|training|logging), step \d+$",
        stacks,
        re.MULTILINE,
    ), stacks
    assert "in run_training" in stacks and "loop.py" in stacks, stacks
    assert end(ranks)[1] == -signal.SIGKILL


@pytest.mark.slow
def test_a_rank_that_sleeps_inside_a_step_is_named_with_its_line(
    dataset: Path, tmp_path: Path
) -> None:
    command = write(dataset, tmp_path, train={"hang_seconds": 5})
    ranks = start_ranks(
        [["-m", "tests.support.job_probe", str(tmp_path / "out.json"), f"sleeping={command[2]}"]]
        * 2,
        tmp_path / "logs",
    )
    assert end(ranks) == [76, 76], logs(tmp_path / "logs")
    reason = read_exit_record(tmp_path / "run")["reason"]
    assert (
        f"rank 1 on {os.uname().nodename} does not come to where the others wait; it is at "
        in reason
    ), reason
    assert "job_probe.py" in reason and "at training, step 4" in reason


# A rank that has met the others, and stays where it would lock the run folder
BEFORE_LISTENING = """
import sys, time
import launcher.run
from nextpt.train import run

def wait(*arguments):
    print("about to listen", flush=True)
    time.sleep(600)

run.job_context = wait
sys.exit(launcher.run.main(sys.argv[1:]))
"""


def test_a_signal_before_training_listens_leaves_nothing(dataset: Path, tmp_path: Path) -> None:
    [rank] = start_ranks([["-c", BEFORE_LISTENING, *write(dataset, tmp_path)[1:]]], tmp_path)
    wait_for(lambda: "about to listen" in logs(tmp_path))
    rank.send_signal(signal.SIGUSR1)
    assert rank.wait(300) == 75 and not (tmp_path / "run").exists()


def test_ranks_started_differently_are_refused_by_key(dataset: Path, tmp_path: Path) -> None:
    command = write(dataset, tmp_path)
    ranks = start_ranks(
        [command, command, [*command, "optimizer.lr=0.5", "checkpoint.every_steps=4"]],
        tmp_path / "logs",
    )
    assert end(ranks) == [2, 2, 2], logs(tmp_path / "logs")
    assert (
        "error: the ranks were not started alike: rank 2: config.checkpoint.every_steps = 4"
        " (elsewhere None), config.optimizer.lr = 0.5 (elsewhere 0.003)" in logs(tmp_path / "logs")
    )
    assert not (tmp_path / "run").exists()
