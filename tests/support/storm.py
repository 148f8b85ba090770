"""Storm: training killed with SIGKILL again and again, compared with unbroken runs.

    python -m tests.support.storm [--kills 100] [--launchers 2] [--seed N] [--json FILE]

Runs of a tiny model, saved every few steps, are started, killed and started again until they reach
their last step: ZeRO stages 0 to 3, fp32 and bf16, one rank and two, saves in the background and
not. Ranks are forked (zygote.py) and do what launcher/run.py does; they also report when training
and each save begins and ends, so that kills can be aimed at saves and counted there. A kill hits
all ranks, or one: the others must notice it, and are then ended as a launcher would.

After every kill: each loss that was logged is that of an unbroken run, bit for bit; the checkpoint
that the next start takes is not older than the last one published (CheckpointEvent); the repeated
steps are at most the interval between saves (twice that with saves in the background, of which one
may be under way). At the end: all losses, and a hash of all weights and moments, are those of the
unbroken run. After the storm nothing is left: shared memory, open files, processes, staging
folders, temporary files, held locks. The first breach ends the storm with the seed that plans the
same kills again.

--launchers: kills of `nextpt train`, deepspeed's runner or deepspeed's launch.py, each of a cold
start. A thread cannot be killed alone: loader threads and the writer of a background save die with
their rank.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernels.bench.machine import write_json
from nextpt.base.errors import EXIT_CRASHED
from nextpt.base.processes import command_line
from nextpt.config import to_yaml
from nextpt.events import read_events
from nextpt.job.environment import read_starts
from nextpt.job.exit_record import read_exit_record
from tests.support.datasets import make_dataset, tiny
from tests.support.figures import machine
from tests.support.forked import run_in_child
from tests.support.storm_records import (
    CASES,
    INTERVAL,
    PATIENCE,
    STEPS,
    Case,
    Kill,
    Reference,
    Run,
    StormError,
    digest,
    leftovers,
    losses,
    others_noticed,
    own_shared_memory,
    summary,
    working_on,
)
from tests.support.zygote import (
    Job,
    become_subreaper,
    import_training,
    orphans,
    restart_single_threaded,
)

ROOT = Path(__file__).resolve().parents[2]
TRAINING, SAVING, SAVED = 0, 64, 128  # what a rank reports, plus its number


def report_progress(rank: int, send: Callable[[int], object]) -> None:
    """Report when training begins and when each save (with retention) begins and ends."""
    from nextpt.checkpoint.manager import CheckpointManager
    from nextpt.train.loop import Trainer

    write, fit = CheckpointManager._write, Trainer.fit

    def writing(self: CheckpointManager, *arguments: Any) -> None:
        send(SAVING + rank)
        write(self, *arguments)
        send(SAVED + rank)

    def fitting(self: Trainer) -> None:
        send(TRAINING + rank)
        fit(self)

    CheckpointManager._write, Trainer.fit = writing, fitting


class Storm:
    """Kills of jobs.

    Args:
        folder: New folder of all files.
        seed: Of the choice of victims and moments.
        log: Prints progress.
        optimizer: `optimizer.kind` of the runs.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        log: Callable[[str], None] = print,
        optimizer: str = "adamw",
    ) -> None:
        self.folder, self.seed, self.log, self.optimizer = folder, seed, log, optimizer
        self.dataset = folder / "dataset" / "shards"
        # Preparation has worker processes
        if run_in_child(
            lambda: make_dataset(Path(sysconfig.get_path("stdlib")) / "email", folder / "dataset")
        ):
            raise StormError("no dataset could be made")
        self.kills: list[Kill] = []
        self.leaks: Counter[str] = Counter()
        self.runs = 0
        self._references: dict[Case, Reference] = {}

    def new_run(self, case: Case, **train: Any) -> Run:
        name = f"{case}-{self.runs:04d}"
        self.runs += 1
        config = tiny(
            self.dataset,
            self.folder / name,
            data={"scratch": str(self.folder / "scratch")},
            optimizer={"lr": 3e-3, "kind": self.optimizer},
            train={
                "steps": STEPS,
                "global_batch_size": 4,
                "zero_stage": case.stage,
                "precision": case.precision,
            }
            | train,
            checkpoint={"every_steps": INTERVAL, "keep_last": 2, "asynchronous": case.asynchronous},
        )
        path = self.folder / f"{name}.yaml"
        path.write_text(to_yaml(config))
        return Run(case, self.folder / name, path)

    def reference(self, case: Case) -> Reference:
        """The unbroken run of a case, cached."""
        if case not in self._references:
            run = self.new_run(case)
            began = time.monotonic()
            job = Job(["--config", str(run.config)], case.ranks, run.log, report_progress)
            job.listen(time.monotonic() + PATIENCE)
            self.expect(job.wait() == [0] * case.ranks, run, "an unbroken run failed")
            job.close()
            begins = [t for t, byte in job.messages if byte == SAVING]
            ends = [t for t, byte in job.messages if byte == SAVED]
            self._references[case] = Reference(
                losses(run.folder),
                digest(run.folder),
                time.monotonic() - began,
                [b - a for a, b in zip(begins, ends, strict=True)],
            )
        return self._references[case]

    def expect(self, holds: bool, run: Run, text: str) -> None:
        if not holds:
            tail = run.log.read_text()[-4000:] if run.log.exists() else ""
            raise StormError(
                f"{run.case}: {text} (seed {self.seed}, {len(self.kills)} kills before)\n{tail}"
            )

    # ---- kills

    def kill_ranks(self, case: Case, kills: int) -> None:
        """Kill runs of a case `kills` times; then finish each run and compare it."""
        dice, reference = random.Random(f"{self.seed} {case}"), self.reference(case)
        goal = len(self.kills) + kills
        while len(self.kills) < goal:
            run, finished = self.new_run(case), False
            while not finished:
                finished = self.run_once(run, dice if len(self.kills) < goal else None)
            self.check_end(run, reference)

    def run_once(self, run: Run, dice: random.Random | None) -> bool:
        """One start, killed at random or not; True if it finished."""
        case, reference = run.case, self.reference(run.case)
        job = Job(["--config", str(run.config)], case.ranks, run.log, report_progress)
        kill = None
        if dice is None:
            job.listen(time.monotonic() + PATIENCE)
        else:
            victims = "one" if case.ranks > 1 and dice.random() < 0.5 else "all"
            hit = (
                [dice.randrange(case.ranks)]
                if victims == "one"
                else dice.sample(range(case.ranks), case.ranks)
            )
            aimed = "save" if dice.random() < 0.6 else "anywhere"
            if self.wait_for_moment(job, aimed, hit[0], dice, reference):
                kill = self.kill(job, run, victims, aimed, hit)
        codes = job.wait(PATIENCE)
        job.close()
        self.expect(codes is not None, run, "ranks did not end")
        if kill and -signal.SIGKILL in codes:
            self.expect(
                set(codes) <= {-signal.SIGKILL, EXIT_CRASHED, 0}, run, f"ranks ended with {codes}"
            )
            kill.inside = any(job.count(SAVING + rank) > job.count(SAVED + rank) for rank in hit)
            kill.training = job.count(*range(case.ranks)) == case.ranks
            self.kills.append(kill)
        else:
            self.expect(
                codes == [0] * case.ranks,
                run,
                f"ranks ended with {codes} and nobody had killed them",
            )
            kill = None
        self.check_start(run, job.began)
        if kill:
            run.pending.append(kill)
        return kill is None

    def wait_for_moment(
        self, job: Job, aimed: str, rank: int, dice: random.Random, reference: Reference
    ) -> bool:
        """Wait for the moment of a kill; False when the job ended before."""
        share = dice.random()
        if aimed == "anywhere":
            return job.listen(time.monotonic() + share * reference.seconds)
        nth = dice.choice((1, 2, 2, 3, 3, 4))
        begun = job.listen(time.monotonic() + PATIENCE, lambda: job.count(SAVING + rank) >= nth)
        # As long as this job's saves take now, which is longer while the machine is busy
        saves = durations_of_saves(job, rank) or reference.saves
        return begun and job.listen(time.monotonic() + share * statistics.median(saves))

    def kill(self, job: Job, run: Run, victims: str, aimed: str, hit: list[int]) -> Kill:
        """Send SIGKILL.

        If one rank is hit, check that the others notice, unless they had not met yet; then end
        them, as a launcher does.
        """
        case, before = run.case, len(run.log.read_text()) if run.log.exists() else 0
        kill = Kill(
            str(case), case.stage, victims, aimed, case.asynchronous, False, False, time.time()
        )
        began = time.monotonic()
        job.kill(hit)
        if victims == "one":
            if others_noticed(
                job,
                lambda: run.log.read_text()[before:] if run.log.exists() else "",
                lambda: self.are_training(job, case),
            ):
                kill.detected = time.monotonic() - began
            else:
                self.expect(
                    not self.are_training(job, case),
                    run,
                    f"the others noticed nothing for {PATIENCE:g} s after a rank was killed",
                )
            job.kill(list(range(case.ranks)))
        return kill

    def are_training(self, job: Job, case: Case) -> bool:
        """Whether all ranks of a job have begun to train, also those that ended since."""
        job.listen(time.monotonic() + 0.01)
        return job.count(*range(case.ranks)) == case.ranks

    # ---- invariants

    def check_start(self, run: Run, began: float) -> None:
        """Check a start: its checkpoint, its losses, the checkpoints that it published."""
        reference = self.reference(run.case).losses if run.case in self._references else None
        path = run.folder / "metrics.jsonl"
        train_events, starts = read_events(path, "train"), read_starts(run.folder)
        if reference:
            wrong = [e["step"] for e in train_events if reference.get(e["step"]) != e["loss"]]
            self.expect(
                not wrong, run, f"the losses of steps {wrong} are not those of an unbroken run"
            )
        if len(starts) > run.starts:
            run.starts = len(starts)
            resumed = starts[-1]["first_step"] - 1
            self.expect(
                resumed >= run.acknowledged,
                run,
                f"a start took step {resumed}; {run.acknowledged} was acknowledged",
            )
            redone = max(run.last_step - resumed, 0)
            self.expect(redone <= run.case.most_redone, run, f"{redone} steps were made again")
            if run.pending:
                run.pending[-1].redone = redone
                first = min((e["time"] for e in train_events if e["time"] >= began), default=None)
                run.pending[-1].recovered = first and first - run.pending[-1].at
                run.pending.clear()
            run.last_step = resumed
        run.last_step = max(
            [run.last_step, *(e["step"] for e in train_events if e["time"] >= began)]
        )
        run.acknowledged = max(
            [run.acknowledged, *(e["step"] for e in read_events(path, "checkpoint"))]
        )

    def check_end(self, run: Run, reference: Reference) -> None:
        """Check a finished run: equal to the unbroken run, and nothing left behind."""
        self.expect(
            losses(run.folder) == reference.losses,
            run,
            "the losses are not those of the unbroken run",
        )
        self.expect(
            digest(run.folder) == reference.digest,
            run,
            "the weights and moments are not those of the unbroken run",
        )
        end = read_exit_record(run.folder) or {}
        self.expect((end.get("code"), end.get("step")) == (0, STEPS), run, f"exit.json says {end}")
        for kind, names in leftovers(run.folder).items():
            self.leaks[kind] += len(names)
            self.expect(not names, run, f"{kind} were left: {names}")
        shutil.rmtree(run.folder)
        run.log.unlink()

    # ---- launchers

    def kill_launchers(self, kills: int) -> None:
        """Kill the launchers of the ranks, each time in a cold start of `nextpt train`.

        Then let forked ranks finish the run.
        """
        dice = random.Random(f"{self.seed} launchers")
        for number in range(kills):
            case = dice.choice([case for case in CASES if case.ranks == 2])
            victims = ("nextpt train", "deepspeed.launcher.runner", "deepspeed.launcher.launch")
            reference, run = self.reference(case), self.new_run(case)
            while not self.run_launcher_once(run, victims[number % 3], dice):
                run = self.new_run(case)
            while not self.run_once(run, None):
                pass
            self.check_end(run, reference)

    def run_launcher_once(self, run: Run, victim: str, dice: random.Random) -> bool:
        """Kill a launcher of a new run; False if the run ended before."""
        began, case = time.time(), run.case
        with open(run.log, "a") as log:
            job = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "launcher.cli",
                    "train",
                    "--config",
                    str(run.config),
                    "--ranks",
                    "2",
                    "--restarts",
                    "0",
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while not read_events(run.folder / "metrics.jsonl", "train"):
            self.expect(
                time.monotonic() < deadline and job.poll() is None, run, "nextpt train made no step"
            )
            time.sleep(0.02)
        time.sleep(dice.random() * 0.3)
        pids = (
            [job.pid]
            if victim == "nextpt train"
            else [p for p in working_on(run.config) if victim in command_line(p)][:1]
        )
        kill = Kill(
            str(case), case.stage, victim, "anywhere", case.asynchronous, False, True, time.time()
        )
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        struck = time.monotonic()
        while any("run.py --local_rank" in command_line(pid) for pid in working_on(run.config)):
            self.expect(
                time.monotonic() - struck < PATIENCE,
                run,
                f"ranks live {PATIENCE:g} s after {victim} was killed",
            )
            time.sleep(0.02)
        kill.detected = time.monotonic() - struck
        while working_on(run.config):  # deepspeed's launchers poll
            self.expect(
                time.monotonic() - struck < PATIENCE,
                run,
                f"launchers live {PATIENCE:g} s after {victim} was killed",
            )
            time.sleep(0.02)
        code = job.wait(PATIENCE)
        if (read_exit_record(run.folder) or {}).get("code") == 0:
            return False
        self.expect(bool(pids), run, f"no process {victim}")
        self.expect(code != 0, run, f"nextpt train ended with 0 though {victim} was killed")
        self.kills.append(kill)
        self.check_start(run, began)
        run.pending.append(kill)
        return True


def durations_of_saves(job: Job, rank: int) -> list[float]:
    """Seconds of each save that a rank of a job has ended."""
    begins, ends = (
        [at for at, byte in job.messages if byte == kind + rank] for kind in (SAVING, SAVED)
    )
    return [end - begin for begin, end in zip(begins, ends, strict=False)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="of ranks")
    parser.add_argument("--launchers", type=int, default=2, help="kills of launchers")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--optimizer", default="adamw", help="optimizer.kind of the runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    os.environ["PYTHONWARNINGS"] = "ignore"
    private = own_shared_memory()
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    try:
        import_training()
        become_subreaper()
        result = run_storm(Storm(folder, seed, optimizer=options.optimizer), options, private)
    except StormError as breach:
        print(f"error: {breach}\nwhat it left is in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(json.dumps({key: value for key, value in result.items() if key != "each"}, indent=1))
    write_json(options.json, result)
    return 0


def run_storm(storm: Storm, options: argparse.Namespace, private: bool) -> dict[str, Any]:
    """The whole storm, as JSON values. Raises StormError."""
    began, load, files = time.monotonic(), os.getloadavg()[0], len(os.listdir("/proc/self/fd"))
    shared = set(os.listdir("/dev/shm"))
    for number, case in enumerate(CASES):
        quota = options.kills * (number + 1) // len(CASES) - options.kills * number // len(CASES)
        if quota:
            storm.kill_ranks(case, quota)
            storm.log(
                f"{len(storm.kills):5d} kills, {sum(k.inside for k in storm.kills)} in saves,"
                f" {time.monotonic() - began:.0f} s: {case}"
            )
    storm.kill_launchers(options.launchers)

    def leaked() -> dict[str, int | None]:
        return dict(storm.leaks) | {
            "processes": len(orphans()),
            "open files": len(os.listdir("/proc/self/fd")) - files,
            "shared memory": len(set(os.listdir("/dev/shm")) - shared) if private else None,
            "extension folders": sum(1 for _ in (storm.folder / "extensions").rglob("*")),
        }

    # Python's resource trackers end, and clear up, after the processes that had them
    deadline = time.monotonic() + 60
    while any((leaks := leaked()).values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if any(leaks.values()):
        raise StormError(f"the storm left {leaks} (seed {storm.seed})")
    return {
        "machine": machine(),
        "load": {"at the start": round(load, 1), "at the end": round(os.getloadavg()[0], 1)},
        "seed": storm.seed,
        "seconds": round(time.monotonic() - began),
        "runs_finished": storm.runs - len(storm._references),
        **summary(storm.kills),
        "left_behind": leaks,
        "each": [asdict(kill) for kill in storm.kills],
    }


if __name__ == "__main__":
    restart_single_threaded("tests.support.storm")
    sys.exit(main())
