"""Preparation by a job array on a real Slurm: killed in the middle, begun again with another number of tasks, the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.prepare import prepare
from data_prep.workers import LocalWorkers
from tests.cluster.test_slurm import cluster  # noqa: F401  (a fixture)
from tests.faults.test_life import wait_for
from tests.support.prep_worlds import content, texts, world, write_lines
from tests.support.slurm_cluster import Slurm

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def test_an_array_that_was_killed_goes_on_with_another_number_of_tasks(cluster: Slurm, tmp_path: Path) -> None:  # noqa: F811
    spec = world(tmp_path)
    many = texts(2000, 7) * 12  # long enough to be killed in; repeats are dropped
    domains = {f"d{i}": write_lines(tmp_path / f"in/d{i}.jsonl", [f"{i} {j} {text}" for j, text in enumerate(many)]) for i in range(4)}
    spec = spec.model_copy(update={"domains": domains})
    output = tmp_path / "by_array"

    def submit(tasks: str) -> str:
        return cluster.submit("--array", tasks, "--cpus-per-task=1", "--mem-per-cpu=100", f"--output={tmp_path}/%A_%a.log", str(ROOT / "launcher/slurm/prep_array.sbatch"),
                              *(f"{name}={place}" for name, place in domains.items()), "--sequence-length", "64", "--heldout", "0.2",
                              "--tokenizer", str(spec.tokenizer), "--output", str(output), cwd=ROOT)

    def done() -> set[Path]:
        return set(tmp_path.glob("by_array.work/tok/*.tok"))

    job = submit("0-1")
    wait_for(lambda: done())
    cluster.run("scancel", "--full", "--signal=KILL", job)
    wait_for(lambda: not cluster.run("squeue", "-h", "-j", job), 60)
    assert 0 < len(done()) < len(domains) and not output.exists()

    job = submit("3,7-8")
    wait_for(lambda: not cluster.run("squeue", "-h", "-j", job), 300)
    assert (output / "dataset.json").is_file(), "\n".join(p.read_text() for p in tmp_path.glob(f"{job}_*.log"))
    prepare(spec, workers=LocalWorkers(2))
    assert content(output) == content(spec.output)
