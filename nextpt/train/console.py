"""Console output of training: a progress line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nextpt.base.collective import RankGroup
from nextpt.events import (
    BatchEvent,
    CheckpointEvent,
    Event,
    MirrorEvent,
    RollbackEvent,
    SaveFailedEvent,
    SkipEvent,
    StepEvent,
    ValidationEvent,
)

BAR_FROM_WIDTH = 110  # columns; without the bar the line fits 80
PLAIN_SECONDS = 10.0  # least time between two steps that are printed without a terminal


def print_on_rank_0(group: RankGroup, text: str) -> None:
    """Print a line for the user on rank 0 alone."""
    if group.rank == 0:
        with suppress(OSError):  # a full disk under the log: no reason to end
            print(text, flush=True)


class ConsoleListener:
    """Prints events.

    On a terminal steps update one progress line, and everything else scrolls above it. Elsewhere a
    step is printed at most every PLAIN_SECONDS seconds, so that logs stay short.

    Args:
        first_step: First step of this start.
        last_step: Last step of the run.
    """

    def __init__(self, first_step: int, last_step: int) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.first_step = first_step
        self.last_step = last_step
        self.start_time = time.monotonic()
        self.last_print_time = 0.0
        self.progress: Progress | None = None
        if self.console.is_terminal:
            bar = [BarColumn(20)] if self.console.width >= BAR_FROM_WIDTH else []
            self.progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                *bar,
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self.task = self.progress.add_task(
                "starting", total=last_step, completed=first_step - 1
            )
            self.progress.start()

    def on_event(self, event: Event) -> None:
        """Print an event; a log on a full disk goes without."""
        with suppress(OSError):
            self._print(event)

    def _print(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            self._print_step(event)
        else:
            if isinstance(event, BatchEvent):
                self.last_step = event.last_step
                if self.progress is not None:
                    self.progress.update(self.task, total=event.last_step)
            self.console.print(_describe(event))

    def _print_step(self, event: StepEvent) -> None:
        if self.progress is not None:
            text = (
                f"loss {event.loss:.3f} nats {event.bpb:.3f} bits/B {event.tokens_per_second:,.0f}"
                f" tok/s lr {event.lr:.1e} norm {event.grad_norm:.2f}"
            )
            self.progress.update(self.task, completed=event.step, description=text)
            return
        now = time.monotonic()
        if now - self.last_print_time < PLAIN_SECONDS and event.step != self.last_step:
            return
        self.last_print_time = now
        steps = event.step - self.first_step + 1
        left = (now - self.start_time) / steps * (self.last_step - event.step)
        self.console.print(
            f"step {event.step}/{self.last_step}  loss {event.loss:.4f} nats"
            f"  {event.bpb:.3f} bits/byte  {event.tokens_per_second:,.0f} tokens/s"
            f"  lr {event.lr:.2e}  grad norm {event.grad_norm:.2f}"
            f"  left {int(left // 60)}:{int(left % 60):02d}"
        )

    def close(self) -> None:
        """End the progress line."""
        if self.progress is not None:
            with suppress(OSError):
                self.progress.stop()


def _describe(event: Event) -> str:
    """One line about an event other than a step."""
    match event:
        case ValidationEvent():
            parts = [_domain_losses(event.domains)]
            parts += [
                f"{name}: {_domain_losses(metrics['domains'])}"
                for name, metrics in event.averages.items()
            ]
            return f"validation, step {event.step}: " + "; ".join(parts)
        case BatchEvent():
            reason = "the stable run decided so"
            if event.noise_scale is not None:
                reason = f"the noise scale is {event.noise_scale:,.0f} targets"
            return (
                f"batch of {event.batch_size} sequences after step {event.step}: {reason}; the run"
                f" ends at step {event.last_step}"
            )
        case CheckpointEvent():
            return f"checkpoint {event.path} ({_size(event.bytes)} in {event.seconds:.1f} s)"
        case SkipEvent():
            limits = ""
            if event.loss_limit is not None and event.grad_norm_limit is not None:
                limits = f"; limits {event.loss_limit:.4f} and {event.grad_norm_limit:.2f}"
            return (
                f"step {event.step} skipped: {event.reason} (loss {event.loss:.4f}, grad norm"
                f" {event.grad_norm:.2f}{limits}), {event.consecutive} in a row, {event.skipped} in"
                " all"
            )
        case RollbackEvent():
            return (
                f"rolled back to step {event.step} after bad steps {event.first_bad} to"
                f" {event.last_bad} ({event.reason}); sequences {event.first_sequence} to"
                f" {event.stop_sequence - 1} are skipped"
            )
        case SaveFailedEvent():
            return (
                f"warning: no checkpoint of step {event.step}: {event.message}; training goes on"
                f" (failed saves in a row: {event.consecutive}, see checkpoint.on_failure)"
            )
        case MirrorEvent():
            return _describe_mirror(event)
    raise TypeError(f"{type(event).__name__} has no line on the console")


def _domain_losses(domains: dict[str, dict[str, float]]) -> str:
    return ", ".join(
        f"{name} {metrics['nats_per_token']:.3f} nats {metrics['bpb']:.3f} bpb"
        for name, metrics in domains.items()
    )


def _describe_mirror(event: MirrorEvent) -> str:
    waiting = f"; {event.waiting} waiting" if event.waiting else ""
    if event.status == "mirrored":
        return f"mirrored {event.path} ({_size(event.bytes)} in {event.seconds:.1f} s{waiting})"
    if event.status == "failing":
        return (
            f"warning: the mirror takes no checkpoints: {event.message}; it is tried again,"
            f" training goes on{waiting}"
        )
    return f"warning: mirror: {event.message}{waiting}"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
