"""Soak: share of time that is training while ranks are killed, and time to detect a hang.

    python -m tests.support.soak [--seconds 600] [--mtbf 60] [--cold] [--hangs 1] [--seed N]
        [--json FILE]

One run of two ranks (ZeRO 1, fp32, saves in the background), of which one is killed at Poisson
instants, --mtbf seconds apart on average, and which is started again as soon as the other has
ended. The effective training time is the time in steps that were kept, over all time: starting,
saving, repeated steps and waiting for the other rank are lost. Ranks are forked, with everything
imported, or with --cold new processes. --hangs: number of SIGSTOPs to one of two ranks;
train.hang_seconds is 60.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernels.bench.machine import write_json
from nextpt.base.errors import EXIT_HUNG, EXIT_REQUEUE
from nextpt.events import read_events
from nextpt.job.exit_record import read_exit_record
from tests.support.figures import machine, quantiles
from tests.support.ranks import start_ranks
from tests.support.storm import Storm, report_progress
from tests.support.storm_records import Case, Run, StormError, others_noticed
from tests.support.zygote import Job, import_training, restart_single_threaded

ROOT = Path(__file__).resolve().parents[2]
INTERVAL = 40  # steps between saves; of about a tenth of a second each


class ColdJob:
    """Two ranks as new processes, with what `soak` uses of a Job."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.began = time.time()
        self.processes = start_ranks(
            [[str(ROOT / "launcher" / "run.py"), *arguments]] * 2, log.with_suffix("")
        )
        self.pids = [process.pid for process in self.processes]

    def listen(self, until: float) -> bool:
        while time.monotonic() < until:
            if any(process.poll() is not None for process in self.processes):
                return False
            time.sleep(0.02)
        return True

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.processes[rank].kill()

    def wait(self, seconds: float = 60) -> list[int] | None:
        deadline = time.monotonic() + seconds
        try:
            return [
                process.wait(max(deadline - time.monotonic(), 0.01)) for process in self.processes
            ]
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Nothing to close: there is no pipe."""


def start(storm: Storm, run: Run, cold: bool) -> Job | ColdJob:
    arguments = [
        "--config",
        str(run.config),
        "model.width=128",
        "model.depth=4",
        "train.global_batch_size=16",
        f"checkpoint.every_steps={INTERVAL}",
    ]
    return ColdJob(arguments, run.log) if cold else Job(arguments, 2, run.log, report_progress)


def output(job: Job | ColdJob, run: Run) -> str:
    """Output of the ranks; forks share a log with earlier ones."""
    logs = run.log.with_suffix("").glob("rank-*.log") if isinstance(job, ColdJob) else [run.log]
    return "".join(log.read_text() for log in logs)


def run_with_kills(
    storm: Storm, run: Run, seconds: float, mtbf: float, begin: Callable[[], Job | ColdJob]
) -> tuple[float, list[dict[str, float]]]:
    """Start, kill and restart ranks for a duration.

    Returns the seconds that passed, and {redone, recovered} of each kill.
    """
    dice = random.Random(f"{storm.seed} soak")
    origin, next_kill = time.monotonic(), dice.expovariate(1 / mtbf)
    job, last_step, kills, killed_at = begin(), 0, [], 0.0
    while True:
        storm.expect(
            job.listen(origin + min(next_kill, seconds)),
            run,
            "ranks ended though nobody had killed them",
        )
        over = time.monotonic() - origin >= seconds
        duration, struck = time.monotonic() - origin, time.time()
        if over:
            os.kill(job.pids[0], signal.SIGTERM)
            codes = job.wait(60)
            storm.expect(
                codes == [EXIT_REQUEUE] * 2, run, f"ranks ended with {codes} after SIGTERM"
            )
        else:
            before = len(output(job, run))
            job.kill([dice.randrange(2)])
            others_noticed(
                job, lambda job=job, before=before: output(job, run)[before:], lambda: False
            )
            job.kill([0, 1])  # as a launcher does
            job.wait()
        job.close()
        fresh = [
            e for e in read_events(run.folder / "metrics.jsonl", "train") if e["time"] >= job.began
        ]
        if fresh and killed_at:
            kills[-1] |= {
                "redone": last_step - fresh[0]["step"] + 1,
                "recovered": fresh[0]["time"] - killed_at,
            }
        last_step = max([last_step, *(e["step"] for e in fresh)])
        if over:
            return duration, kills
        kills.append({})
        killed_at = struck
        next_kill += dice.expovariate(1 / mtbf)
        job = begin()


def soak(storm: Storm, seconds: float, mtbf: float, cold: bool) -> dict[str, Any]:
    """Shares of the time by purpose. Raises StormError."""
    run, began = storm.new_run(Case(1, "fp32", 2, True), steps=10**6), time.time()
    duration, kills = run_with_kills(storm, run, seconds, mtbf, lambda: start(storm, run, cold))
    events = [
        e
        for e in read_events(run.folder / "metrics.jsonl", "train")
        if e["time"] < began + duration
    ]
    durations = [e["tokens"] / e["step"] / e["tokens_per_second"] for e in events]
    storm.expect(
        [e["step"] for e in events] == list(range(1, len(events) + 1)),
        run,
        "a step is missing, or there twice",
    )
    return {
        "seconds": round(duration),
        "mtbf": mtbf,
        "start": "new processes" if cold else "forked",
        "kills": len(kills),
        "steps": len(events),
        "steps_between_saves": INTERVAL,
        "seconds_per_step": quantiles(durations),
        "steps_redone": quantiles(k["redone"] for k in kills if k),
        "seconds_to_the_next_step": quantiles(k["recovered"] for k in kills if k),
        "effective_training_time": round(sum(durations) / duration, 4),
    }


def hang(storm: Storm) -> dict[str, float]:
    """Seconds from SIGSTOP of a rank until the other names it, and until the other has ended."""
    run = storm.new_run(Case(1, "fp32", 2, False), steps=10**6)
    job = start(storm, run, False)
    while not [e for e in read_events(run.folder / "metrics.jsonl", "train") if e["step"] >= 20]:
        storm.expect(job.listen(time.monotonic() + 0.1), run, "ranks ended by themselves")
    stopped = time.time()
    os.kill(job.pids[1], signal.SIGSTOP)
    stacks = run.folder / "stacks" / "rank-0.txt"
    while not stacks.exists():
        job.listen(time.monotonic() + 0.05)
        storm.expect(time.time() - stopped < 120, run, "a hang was not found")
    detection_seconds = time.time() - stopped
    job.listen(time.monotonic() + 60, lambda: read_exit_record(run.folder) is not None)
    while not (end := read_exit_record(run.folder)):
        time.sleep(0.05)
    storm.expect(
        end["code"] == EXIT_HUNG and "rank 1 on" in end["reason"], run, f"exit.json says {end}"
    )
    report_seconds = end["time"] - stopped
    job.kill([1])
    storm.expect(job.wait() == [EXIT_HUNG, -signal.SIGKILL], run, f"ranks ended with {job.codes}")
    job.close()
    return {
        "detection_seconds": round(detection_seconds, 1),
        "report_seconds": round(report_seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--mtbf", type=float, default=60)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--hangs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    load = os.getloadavg()[0]
    try:
        import_training()
        storm = Storm(folder, options.seed)
        hangs = [hang(storm) for _ in range(options.hangs)]
        result = soak(storm, options.seconds, options.mtbf, options.cold) | {"hangs": hangs}
    except StormError as breach:
        print(f"error: {breach}\nwhat it left is in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    result |= {
        "machine": machine(),
        "load": {"at the start": round(load, 1), "at the end": round(os.getloadavg()[0], 1)},
    }
    print(json.dumps(result, indent=1))
    write_json(options.json, result)
    return 0


if __name__ == "__main__":
    restart_single_threaded("tests.support.soak")
    sys.exit(main())
