"""Where workers run.

All of them do the same (data_prep.stages.run_worker); they meet in the work folder only.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import sys
from abc import ABC, abstractmethod
from multiprocessing.connection import Connection, wait
from pathlib import Path

from data_prep.stages import run_worker
from nextpt.base.errors import DataPrepError, UserError

ROOT = Path(__file__).resolve().parent.parent


class Workers(ABC):
    """Starts workers on a work folder and returns when the preparation is finished."""

    @abstractmethod
    def run(self, work: Path) -> None:
        """Raises DataPrepError with the reason when the preparation cannot be finished."""


class LocalWorkers(Workers):
    """Processes of this machine.

    In a job array this task is number `task` of `tasks`, each with as many processes.
    """

    def __init__(self, count: int, task: int = 0, tasks: int = 1) -> None:
        self.count, self.first, self.total = count, task * count, tasks * count

    def run(self, work: Path) -> None:
        if self.count == 1:
            _work(work, self.first, self.total)
            return
        # A fork would share threads of libraries that do not survive it
        context = multiprocessing.get_context("spawn")
        with _one_thread_each():
            children = []
            for i in range(self.count):
                receiver, sender = context.Pipe(duplex=False)
                child = context.Process(
                    target=_report, args=(work, self.first + i, self.total, sender), daemon=True
                )
                child.start()
                sender.close()
                children.append((child, receiver))
        try:
            self._wait(children)
        finally:
            for child, _ in children:
                child.terminate()
                child.join()

    def _wait(self, children: list[tuple[multiprocessing.Process, Connection]]) -> None:
        """Until one says why it cannot go on, or all have ended.

        The work of one that was killed goes to the others.
        """
        open_ends = {receiver: child for child, receiver in children}
        killed = 0
        while open_ends:
            for receiver in wait(list(open_ends)):
                child = open_ends.pop(receiver)
                try:
                    message = receiver.recv()
                except EOFError:
                    child.join()
                    if child.exitcode > 0:
                        raise DataPrepError(
                            f"worker {child.pid} broke down with the message above; please"
                            " report it"
                        )
                    killed += 1
                    print(
                        f"warning: worker {child.pid} was killed (signal {-child.exitcode}); the"
                        " others do its work",
                        file=sys.stderr,
                    )
                    continue
                if message is not None:
                    raise DataPrepError(message)
        if killed == len(children):
            raise DataPrepError(
                "all workers were killed; is there too little memory? Start again with fewer"
                " --workers, it goes on where it was"
            )


class _one_thread_each:
    """Environment of children: one thread in the tokenizer, as there is one process per core."""

    VALUES = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.VALUES}
        os.environ.update(self.VALUES)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _report(work: Path, worker: int, workers: int, sender: Connection) -> None:
    """Body of a child: its last word is None, or why it cannot go on."""
    try:
        _work(work, worker, workers)
        sender.send(None)
    except UserError as error:
        sender.send(str(error))
    except KeyboardInterrupt:
        sender.send("interrupted")


def _work(work: Path, worker: int, workers: int) -> None:
    try:
        run_worker(work, worker, workers)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataPrepError(
                f"no space left on the device of {work.absolute().parent}; free some and start"
                " again, it goes on where it was"
            ) from error
        raise DataPrepError(f"{error.filename or work}: {error.strerror or error}") from error


class RayWorkers(Workers):
    """Workers of a Ray cluster whose hosts share the work folder, this checkout and its Python environment.

    address: of an existing cluster, "auto" to find one, None to start one on this machine. count:
    as many as the cluster has cores unless given.
    """

    def __init__(self, address: str | None = None, count: int | None = None) -> None:
        self.address, self.count = address, count

    def run(self, work: Path) -> None:
        try:
            import ray
        except ImportError as error:
            raise DataPrepError("Ray is not installed: pip install 'nextpt[ray]'") from error
        try:
            ray.init(
                address=self.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False if self.address is None else None,
                runtime_env={"env_vars": _one_thread_each.VALUES | {"PYTHONPATH": str(ROOT)}},
            )
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise DataPrepError(
                f"Ray cluster {self.address or 'of this machine'}: {str(error).splitlines()[0]}"
            ) from error
        try:
            count = self.count or max(int(ray.cluster_resources().get("CPU", 1)), 1)
            task = ray.remote(num_cpus=1, max_retries=3)(_work)
            ray.get([task.remote(work.absolute(), i, count) for i in range(count)])
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, UserError) else error
            raise DataPrepError(str(cause)) from None
        except ray.exceptions.RayError as error:
            raise DataPrepError(
                f"Ray gave up: {str(error).splitlines()[0]}; start again, it goes on where it was"
            ) from error
        finally:
            ray.shutdown()
