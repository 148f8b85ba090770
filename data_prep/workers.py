"""Workers of a preparation: local processes or a Ray cluster.

All run data_prep.stages.run_worker, and meet in the work folder only.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeAlias

from data_prep.stages import run_worker
from nextpt.base.errors import DataPrepError, UserError
from nextpt.base.processes import exit_with_parent

ROOT = Path(__file__).resolve().parent.parent
_Receiver: TypeAlias = "Connection[Any, Any]"


class Workers(ABC):
    """Starts workers on a work folder and returns when the preparation is finished."""

    @abstractmethod
    def run(self, work: Path) -> None:
        """Run until the preparation is finished.

        Raises:
            DataPrepError: When it cannot be finished.
        """


class LocalWorkers(Workers):
    """Processes of this machine.

    In a job array this task is number `task` of `tasks`, with `count` processes each.
    """

    def __init__(self, count: int, task: int = 0, tasks: int = 1) -> None:
        self.count = count
        self.first = task * count
        self.total = tasks * count

    def run(self, work: Path) -> None:
        """Run until the preparation is finished; see Workers."""
        if self.count == 1:
            _work(work, self.first, self.total)
            return
        # Threads of libraries do not survive a fork
        context = multiprocessing.get_context("spawn")
        with _single_threaded_environment():
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

    def _wait(self, children: list[tuple[SpawnProcess, _Receiver]]) -> None:
        """Wait until a worker reports why it cannot continue, or all have ended.

        The others take over the work of one that was killed.
        """
        open_ends = {receiver: child for child, receiver in children}
        killed = 0
        while open_ends:
            for receiver in [end for end in wait(list(open_ends)) if isinstance(end, Connection)]:
                child = open_ends.pop(receiver)
                try:
                    message = receiver.recv()
                except EOFError:
                    child.join()
                    exit_code = child.exitcode or 0
                    if exit_code > 0:
                        raise DataPrepError(
                            f"worker {child.pid} crashed with the message above; please report it"
                        ) from None
                    killed += 1
                    print(
                        f"warning: worker {child.pid} was killed (signal {-exit_code}); the"
                        " others do its work",
                        file=sys.stderr,
                    )
                    continue
                if message is not None:
                    raise DataPrepError(message)
        if killed == len(children):
            raise DataPrepError(
                "all workers were killed; is there too little memory? Start again with fewer"
                " --workers, it continues where it was"
            )


# Environment of worker processes: one thread in each tokenizer, as there is one process per core.
SINGLE_THREADED = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def _single_threaded_environment() -> Iterator[None]:
    """Set SINGLE_THREADED in this process's environment while children are started."""
    before = {name: os.environ.get(name) for name in SINGLE_THREADED}
    os.environ.update(SINGLE_THREADED)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _report(work: Path, worker: int, workers: int, sender: Connection[Any, Any]) -> None:
    """Body of a worker process: sends None at its end, or why it cannot continue."""
    exit_with_parent()
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
                " again, it continues where it was"
            ) from error
        raise DataPrepError(f"{error.filename or work}: {error.strerror or error}") from error


class RayWorkers(Workers):
    """Workers of a Ray cluster whose hosts share the work folder, checkout and environment.

    Args:
        address: Of an existing cluster; "auto" finds one; None starts one on this machine.
        count: Number of workers; by default one per core of the cluster.
    """

    def __init__(self, address: str | None = None, count: int | None = None) -> None:
        self.address = address
        self.count = count

    def run(self, work: Path) -> None:
        """Run until the preparation is finished; see Workers."""
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
                runtime_env={"env_vars": SINGLE_THREADED | {"PYTHONPATH": str(ROOT)}},
            )
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise DataPrepError(
                f"Ray cluster {self.address or 'of this machine'}: {str(error).splitlines()[0]}"
            ) from error
        try:
            resources = ray.cluster_resources()  # type: ignore[no-untyped-call]  # ray has no types
            count = self.count or max(int(resources.get("CPU", 1)), 1)
            task = ray.remote(num_cpus=1, max_retries=3)(_work)
            ray.get([task.remote(work.absolute(), i, count) for i in range(count)])
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, UserError) else error
            raise DataPrepError(str(cause)) from None
        except ray.exceptions.RayError as error:
            raise DataPrepError(
                f"Ray gave up: {str(error).splitlines()[0]}; start again, it continues where it was"
            ) from error
        finally:
            ray.shutdown()
