"""Progress display of a preparation: a bar per stage on a terminal, lines in a log."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from humanize import metric, naturalsize
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from data_prep.plan import Plan
from data_prep.stages import stages
from data_prep.work import Stage, advanced
from nextpt.base.errors import UserError

# Seconds between polls; longer where a poll is slow, so that polling takes at most a twentieth.
POLL = 0.5
LOG_EVERY = 30.0  # seconds between lines where there is no terminal
WORDS = {
    "tokenizer": "choosing the tokenizer",
    "tokenize": "tokenizing",
    "duplicates": "looking for duplicates",
    "layout": "laying out",
    "pack": "packing",
    "finish": "finishing",
}


@contextmanager
def watching(plan: Plan, console: Console) -> Iterator[None]:
    """Show the progress of a preparation, whichever workers do it, while the block runs."""
    if console.quiet:
        yield
        return
    stop = threading.Event()
    watch = _Bars(plan, console, stop) if console.is_terminal else _Lines(plan, console, stop)
    thread = threading.Thread(target=watch.run, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Watch(ABC):
    """Follows the stages until the last is done or `stop` is set."""

    def __init__(self, plan: Plan, console: Console, stop: threading.Event) -> None:
        self.plan = plan
        self.console = console
        self.stop = stop

    def run(self) -> None:
        try:
            for stage in stages(self.plan):
                self.begin(stage)
                if not self._follow(stage):
                    return
        except (OSError, UserError):
            # The work folder is gone: finished, or failed with an error that the worker reports
            return

    def _follow(self, stage: Stage) -> bool:
        pending = set(range(len(stage.sizes)))
        total = sum(stage.sizes)
        finished = 0
        while True:
            started = time.monotonic()
            for item in [i for i in pending if stage.done(i)]:
                pending.remove(item)
                finished += stage.sizes[item]
            self.show(
                stage,
                finished + advanced(stage, self.plan.spec.work, pending),
                total,
                len(stage.sizes) - len(pending),
            )
            if not pending:
                return True
            if self.stop.wait(max(POLL, 20 * (time.monotonic() - started))):
                return False

    @abstractmethod
    def begin(self, stage: Stage) -> None:
        """Begin to show a stage."""

    @abstractmethod
    def show(self, stage: Stage, amount: int, total: int, items: int) -> None:
        """Show that `amount` of `total` is done and `items` items are finished."""


class _Bars(_Watch):
    """One bar per stage."""

    def run(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        with self.progress:
            super().run()

    def begin(self, stage: Stage) -> None:
        self.task = self.progress.add_task(WORDS[stage.name], total=sum(stage.sizes), detail="")
        self.began = time.monotonic()
        self.first: int | None = None

    def show(self, stage: Stage, amount: int, total: int, items: int) -> None:
        if self.first is None:
            self.first = amount  # done before, by an earlier start
        rate = (amount - self.first) / max(time.monotonic() - self.began, POLL)
        detail = ""
        if stage.name == "tokenize":
            detail = f"{naturalsize(amount)} of {naturalsize(total)}, {naturalsize(rate)}/s"
        elif stage.name == "pack":
            detail = f"{metric(rate, precision=2)}tokens/s" if rate else ""
        self.progress.update(self.task, completed=amount, detail=detail)


class _Lines(_Watch):
    """A line every LOG_EVERY seconds."""

    def begin(self, stage: Stage) -> None:
        self.began = self.last_line = time.monotonic()
        self.first: int | None = None

    def show(self, stage: Stage, amount: int, total: int, items: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = amount  # done before, by an earlier start
        if now - self.last_line < LOG_EVERY or not total:
            return
        self.last_line = now
        rate = (amount - self.first) / (now - self.began)
        left = (
            f"{(total - amount) / rate / 60:.0f} minutes left" if rate > 0 else "time left unknown"
        )
        self.console.print(
            f"{WORDS[stage.name]}: {amount / total:.0%}, {items} of {len(stage.sizes)} units,"
            f" {left}"
        )
