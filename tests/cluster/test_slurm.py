"""Training on a real Slurm of two nodes: preempted, out of time, cancelled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.jobs.slurm import log_folder, log_path, option_line
from nextpt.config import Config, to_yaml
from nextpt.events import read_events
from nextpt.job.exit_record import read_exit_record
from tests.faults.test_job_context import wait_for
from tests.support.datasets import tiny
from tests.support.ranks import train_all
from tests.support.slurm_cluster import Slurm

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CYCLES = 20


def losses(run: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in read_events(run / "metrics.jsonl", "train")}


def logged_steps(run: Path) -> int:
    return max(losses(run), default=0)


def endless(dataset: Path, run: Path, **train: int) -> Config:
    return tiny(dataset, run, train={"steps": 100_000, "zero_stage": 1} | train)


def submit(cluster: Slurm, config: Config, folder: Path, *options: str) -> str:
    """Number of a job that `nextpt slurm submit` made, from a folder that is not the repository."""
    (folder / "config.yaml").write_text(to_yaml(config))
    completed = subprocess.run(
        [
            sys.executable,
            str(ROOT / "launcher" / "cli.py"),
            "slurm",
            "submit",
            "--config",
            "config.yaml",
            "--nodes",
            "2",
            "--gpus-per-node",
            "0",
            "--cpus-per-rank",
            "1",
            *options,
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | cluster.variables,
        timeout=600,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout.split("job ")[1].split(":")[0]


def log(run: Path, job: str) -> str:
    return (run / "slurm" / f"{job}.log").read_text()


def wait_for_requeue(cluster: Slurm, job: str, restarts: int) -> None:
    wait_for(
        lambda: (
            (state := cluster.job(job))["Restarts"] == str(restarts)
            and state["JobState"] == "PENDING"
        )
    )


def start_again(cluster: Slurm, job: str, restarts: int) -> None:
    """Wait until a job was requeued, and begin it: this cluster leaves the moment to the test.

    Not in the same second: a node refuses credentials as old as those that it revoked at the end.
    """
    wait_for_requeue(cluster, job, restarts)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+1")


def leave_two_minutes(cluster: Slurm, job: str) -> None:
    """Lower the time limit of a running job to between one and two minutes from now.

    Slurm looks for jobs near their limit every 30 seconds and sends the signal of --signal=USR1@120
    at its next look.
    """
    hours, minutes, _ = cluster.job(job)["RunTime"].split(":")
    cluster.run(
        "scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}"
    )


def test_repeated_preemptions_give_the_losses_of_an_unbroken_run(
    cluster: Slurm, dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, endless(dataset, run), tmp_path)
    ends = []
    for cycle in range(1, CYCLES + 1):
        before = logged_steps(run)
        wait_for(lambda before=before: logged_steps(run) > before)
        other = cluster.submit(
            "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true"
        )
        cluster.wait_for(other, "COMPLETED")
        end = read_exit_record(run)
        assert end["code"] == 75 and end["step"] > before, (cycle, end, log(run, job))
        ends.append(end["step"])
        start_again(cluster, job, cycle)
    wait_for(lambda: logged_steps(run) > ends[-1])
    cluster.run("scancel", "--signal=TERM", job)
    start_again(cluster, job, CYCLES + 1)
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    actual = losses(run)
    assert train_all(
        [endless(dataset, tmp_path / "unbroken", stop_at=max(actual))], 2, tmp_path / "logs"
    ) == [None]
    assert actual == losses(tmp_path / "unbroken")
    resumed = [line for line in log(run, job).splitlines() if line.startswith("resuming")]
    assert [int(line.split("after step ")[1].split()[0]) for line in resumed][:CYCLES] == ends, (
        resumed
    )


def test_a_job_out_of_time_saves_and_queues_itself_again(
    cluster: Slurm, dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, endless(dataset, run), tmp_path, "--time", "60")
    wait_for(lambda: logged_steps(run) > 0)
    # Not from the start: a signal that came before the first step would leave nothing to look at.
    leave_two_minutes(cluster, job)
    wait_for_requeue(cluster, job, 1)
    end = read_exit_record(run)
    assert end["code"] == 75 and "stopped by SIGUSR1" in end["reason"], (end, log(run, job))
    assert end["step"] == logged_steps(run)
    cluster.run("scancel", job)
    assert cluster.wait_for(job, "CANCELLED")["Restarts"] == "1"


def test_a_cancelled_job_saves_and_stays_cancelled(
    cluster: Slurm, dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, endless(dataset, run), tmp_path)
    wait_for(lambda: logged_steps(run) > 0)
    cluster.run("scancel", job)
    job_state = cluster.wait_for(job, "CANCELLED")
    wait_for(lambda: read_exit_record(run) is not None)
    assert (
        job_state["Restarts"] == "0"
        and read_exit_record(run)["code"] == 75
        and "saved" in read_exit_record(run)["reason"]
    )


def test_a_user_error_ends_the_job_without_a_retry(
    cluster: Slurm, dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = endless(dataset, run)
    job = submit(cluster, config, tmp_path, "train.init_from=nowhere")
    state = cluster.wait_for(job, "FAILED")
    assert state["ExitCode"] == "2:0" and state["Restarts"] == "0"
    assert sum(line.startswith("error: ") for line in log(run, job).splitlines()) == 1, log(
        run, job
    )


def test_a_finished_run_completes(cluster: Slurm, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tiny(dataset, run), tmp_path)
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log(run, job)
    assert read_exit_record(run)["code"] == 0 and logged_steps(run) == 6


@pytest.mark.parametrize("name", ["a b", "it's", '"quoted"', "50% of %j", "# $HOME &; [x]"])
def test_paths_of_logs_may_hold_any_character(cluster: Slurm, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    (folder / "slurm").mkdir(parents=True)
    script, output = tmp_path / "job.sbatch", f"{log_folder(folder)}/%j.log"
    options = [option_line("--output", output), option_line("--comment", name)]
    script.write_text("\n".join(["#!/bin/bash", *options, "echo done", ""]))
    job = cluster.submit(str(script))
    cluster.wait_for(job, "COMPLETED")
    assert (folder / "slurm" / f"{job}.log").read_text() == "done\n"
    assert log_path(output, job) == str(folder / "slurm" / f"{job}.log")
