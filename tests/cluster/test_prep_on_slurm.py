"""Preparation on a real Slurm, array and Ray: killed and restarted, the output has equal bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from data_prep.prepare import prepare
from data_prep.spec import PrepSpec
from data_prep.workers import LocalWorkers
from tests.faults.test_job_context import wait_for
from tests.support.prep_worlds import content, texts, world, write_lines
from tests.support.slurm_cluster import Slurm

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Work:
    """A preparation long enough for a kill, and the output of its jobs."""

    spec: PrepSpec
    output: Path
    folder: Path

    def submit(self, cluster: Slurm, script: str, log: str, *options: str) -> str:
        """Number of a job."""
        return cluster.submit(
            *options,
            "--cpus-per-task=1",
            "--mem-per-cpu=100",
            f"--output={self.folder}/{log}",
            str(ROOT / "launcher/slurm" / script),
            *(f"{name}={path}" for name, path in self.spec.domains.items()),
            "--sequence-length",
            "64",
            "--validation-fraction",
            "0.2",
            "--tokenizer",
            str(self.spec.tokenizer),
            "--output",
            str(self.output),
            cwd=self.folder,
        )

    def done(self) -> dict[Path, int]:
        """Tokenized units with their times."""
        return {
            path: path.stat().st_mtime_ns for path in Path(f"{self.output}.work").glob("tok/*.tok")
        }

    def logs(self) -> str:
        return "\n".join(p.read_text(errors="replace")[-2000:] for p in self.folder.glob("*.log"))

    def check(self) -> None:
        """The bytes equal those of an undisturbed preparation."""
        assert (self.output / "dataset.json").is_file(), self.logs()
        prepare(self.spec, workers=LocalWorkers(2))
        assert content(self.output) == content(self.spec.output)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    spec = world(tmp_path)
    many = texts(2000, 7) * 12  # duplicates are dropped
    domains = {
        f"d{i}": write_lines(
            tmp_path / f"in/d{i}.jsonl", [f"{i} {j} {text}" for j, text in enumerate(many)]
        )
        for i in range(4)
    }
    for name in (".venv", "launcher", "data_prep", "nextpt", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    return Work(spec.model_copy(update={"domains": domains}), tmp_path / "by_jobs", tmp_path)


def has_ended(cluster: Slurm, job: str) -> bool:
    return not cluster.run("squeue", "-h", "-j", job)


def test_a_killed_array_continues_with_another_number_of_tasks(cluster: Slurm, work: Work) -> None:
    job = work.submit(cluster, "prep_array.sbatch", "%A_%a.log", "--array", "0-1")
    wait_for(work.done)
    cluster.run("scancel", "--full", "--signal=KILL", job)
    wait_for(lambda: has_ended(cluster, job))
    assert 0 < len(work.done()) < len(work.spec.domains) and not work.output.exists()

    job = work.submit(cluster, "prep_array.sbatch", "%A_%a.log", "--array", "3,7-8")
    wait_for(lambda: has_ended(cluster, job), 900)
    work.check()


RAY = ("ray::", "raylet", "gcs_server", "bin/ray start", "ray/_private")


def ray_processes(*words: str) -> list[psutil.Process]:
    """Processes of Ray whose command line has all the words."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (line := " ".join(process.info["cmdline"] or []))
        and any(name in line for name in RAY)
        and all(word in line for word in words)
    ]


@pytest.fixture
def no_ray_left() -> Iterator[None]:
    """Slurm without cgroups, as in these tests, does not end processes that left their group.

    Ray's processes leave it.
    """
    yield
    subprocess.run(
        [str(Path(sys.executable).parent / "ray"), "stop", "--force"],
        capture_output=True,
        timeout=300,
    )


def test_killed_ray_workers_continue_on_fewer_nodes(
    cluster: Slurm, work: Work, no_ray_left: None
) -> None:
    job = work.submit(cluster, "prep_ray.sbatch", "ray-%j.log", "--nodes=2")
    wait_for(lambda: work.done() or cluster.job(job)["JobState"] == "FAILED", 600)
    assert work.done(), work.logs()
    for process in ray_processes():  # all at the same time, as the end of a job's cgroup does
        with suppress(psutil.NoSuchProcess):  # some end with the one before
            process.kill()
    cluster.run("scancel", "--full", "--signal=KILL", job)
    wait_for(lambda: has_ended(cluster, job))
    before = work.done()
    assert 0 < len(before) < len(work.spec.domains) and not work.output.exists()

    job = work.submit(cluster, "prep_ray.sbatch", "ray-%j.log", "--nodes=1")
    wait_for(lambda: work.done().keys() > before.keys() or has_ended(cluster, job), 600)
    after = work.done()
    assert all(after.get(path, when) == when for path, when in before.items()), (
        "a unit that was done was done again"
    )
    wait_for(lambda: has_ended(cluster, job), 900)
    work.check()


def test_ray_continues_after_the_kill_of_a_worker(
    cluster: Slurm, work: Work, no_ray_left: None
) -> None:
    job = work.submit(cluster, "prep_ray.sbatch", "ray-%j.log", "--nodes=2")
    victims: list[psutil.Process] = []
    wait_for(
        lambda: victims.extend(ray_processes("ray::_work")) or victims or has_ended(cluster, job),
        600,
    )
    assert victims, work.logs()
    victims[0].send_signal(signal.SIGKILL)
    wait_for(lambda: has_ended(cluster, job), 900)
    work.check()
