"""Training on several hosts (network namespaces with sshd): --hostfile, deepspeed over pdsh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nextpt.base.processes import command_line
from nextpt.config import Config, to_yaml
from nextpt.events import read_events
from nextpt.job.exit_record import read_exit_record
from tests.faults.test_job_context import wait_for
from tests.support.datasets import tiny
from tests.support.net_hosts import Hosts, hosts, missing
from tests.support.ranks import train_all

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "launcher" / "run.py")
STEPS = 200


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require("pdsh")
    with hosts(tmp_path_factory.mktemp("net") / "hosts", 3) as network:
        yield network


def require(*commands: str) -> None:
    if lacking := missing(*commands):
        assert "NEXTPT_REQUIRE_ALL" not in os.environ, lacking
        pytest.skip(lacking)


def config(dataset: Path, run: Path, **train: int) -> Config:
    return tiny(
        dataset,
        run,
        train={"steps": STEPS, "zero_stage": 1, "global_batch_size": 12} | train,
        checkpoint={"every_steps": 20},
    )


@pytest.fixture(scope="module")
def unbroken(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert train_all([config(dataset, folder / "run")], 2, folder / "logs") == [None]
    return losses(folder / "run")


def losses(run: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in read_events(run / "metrics.jsonl", "train")}


def start(
    on: Hosts, hostfile: Path, settings: Config, folder: Path, *options: str
) -> subprocess.Popen:
    (folder / "config.yaml").write_text(to_yaml(settings))
    command = [
        sys.executable,
        str(ROOT / "launcher" / "cli.py"),
        "train",
        "--config",
        "config.yaml",
        "--hostfile",
        str(hostfile),
        *options,
    ]
    with open(folder / "output", "a") as output:
        return subprocess.Popen(
            command, cwd=folder, env=os.environ | on.variables, stdout=output, stderr=output
        )


def ranks(on: Hosts, name: str) -> list[int]:
    return [pid for pid in on.processes(name) if f"{RUN} --local_rank" in command_line(pid)]


def close(losses: dict[int, float], expected: dict[int, float]) -> bool:
    return losses.keys() == expected.keys() and all(
        abs(losses[s] - expected[s]) <= 1e-6 * expected[s] for s in expected
    )


def test_a_host_that_loses_its_processes_and_a_signal(
    three: Hosts, dataset: Path, unbroken: dict[int, float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = start(three, three.hostfile(1, "h1", "h2"), config(dataset, run), tmp_path)
    wait_for(lambda: max(losses(run), default=0) > 25)
    assert ranks(three, "h1") and ranks(three, "h2")
    for pid in three.processes("h2"):  # all but its sshd
        if "node.py" in command_line(pid) or RUN in command_line(pid):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: "restarting from step" in (tmp_path / "output").read_text())
    last_step = max(losses(run))
    wait_for(lambda: max(losses(run)) > last_step)
    job.send_signal(signal.SIGTERM)
    assert job.wait(600) == 75, (tmp_path / "output").read_text()
    assert read_exit_record(run)["code"] == 75 and not ranks(three, "h1") and not ranks(three, "h2")
    assert (
        start(three, three.hostfile(1, "h1", "h2"), config(dataset, run), tmp_path).wait(900) == 0
    ), (tmp_path / "output").read_text()
    assert losses(run) == unbroken


def test_a_cut_link_is_detected_and_the_run_finishes_on_the_other_hosts(
    three: Hosts, dataset: Path, unbroken: dict[int, float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = config(dataset, run, hang_seconds=20)
    job = start(three, three.hostfile(1), settings, tmp_path)
    wait_for(lambda: max(losses(run), default=0) > 25)
    three.cut("h3")
    began = time.monotonic()
    try:
        wait_for(lambda: "restarting from step" in (tmp_path / "output").read_text(), 600)
        print(f"a cut link was found after {time.monotonic() - began:.1f} s")
        assert job.wait(900) == 0, (tmp_path / "output").read_text()
    finally:
        three.reconnect("h3")
    assert "continuing without h3: host h3: not reachable" in (tmp_path / "output").read_text()
    assert close(losses(run), unbroken)
    wait_for(lambda: not ranks(three, "h3"))


def test_no_rank_outlives_the_one_who_started_it(
    three: Hosts, dataset: Path, tmp_path: Path
) -> None:
    job = start(
        three,
        three.hostfile(1, "h1", "h2"),
        config(dataset, tmp_path / "run", steps=100_000),
        tmp_path,
    )
    wait_for(lambda: max(losses(tmp_path / "run"), default=0) > 2)
    job.kill()
    job.wait()
    wait_for(lambda: not ranks(three, "h1") and not ranks(three, "h2"))


def test_deepspeed_over_pdsh(
    three: Hosts, dataset: Path, unbroken: dict[int, float], tmp_path: Path
) -> None:
    """Over pdsh with deepspeed: killed on one host, restarted with one host less."""
    run = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(to_yaml(config(dataset, run)))

    def deepspeed(hostfile: Path) -> subprocess.Popen:
        with open(tmp_path / "output", "a") as output:
            return subprocess.Popen(
                [
                    str(Path(sys.executable).parent / "deepspeed"),
                    "--hostfile",
                    str(hostfile),
                    "--force_multi",
                    "--master_addr",
                    three.address("h1"),
                    RUN,
                    "--config",
                    str(tmp_path / "config.yaml"),
                ],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env=os.environ | three.variables,
            )

    job = deepspeed(three.hostfile(1, "h1", "h2"))
    wait_for(lambda: max(losses(run), default=0) > 25)
    os.kill(ranks(three, "h2")[0], signal.SIGKILL)
    assert job.wait(600) != 0
    wait_for(lambda: not ranks(three, "h1") and not ranks(three, "h2"))
    job = deepspeed(three.hostfile(1, "h1"))
    assert job.wait(900) == 0, (tmp_path / "output").read_text()
    assert close(losses(run), unbroken) and read_exit_record(run)["code"] == 0


def test_a_killed_pdsh_leaves_no_ranks(three: Hosts, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(to_yaml(config(dataset, run, steps=100_000)))
    job = subprocess.Popen(
        [
            str(Path(sys.executable).parent / "deepspeed"),
            "--hostfile",
            str(three.hostfile(1, "h1", "h2")),
            "--master_addr",
            three.address("h1"),
            RUN,
            "--config",
            str(tmp_path / "config.yaml"),
        ],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | three.variables,
    )
    wait_for(lambda: max(losses(run), default=0) > 2)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    wait_for(lambda: not ranks(three, "h1") and not ranks(three, "h2"))
