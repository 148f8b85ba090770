"""What a person sees while training: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nextpt.events import (
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


class ConsoleListener:
    """Prints events.

    On a terminal steps update one progress line and everything else scrolls above it.

    Without a terminal a step is printed at most every `plain_seconds` seconds, so that logs stay
    short.
    """

    def __init__(self, first_step: int, last_step: int, plain_seconds: float = 10.0) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.last_step, self.plain_seconds, self.printed_at = last_step, plain_seconds, 0.0
        self.started, self.first_step = time.monotonic(), first_step
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
        if isinstance(event, StepEvent):
            self._on_step(event)
        elif isinstance(event, ValidationEvent):
            parts = [
                f"{name} {f['nats_per_token']:.3f} nats {f['bpb']:.3f} bpb"
                for name, f in event.domains.items()
            ]
            self.console.print(f"held out, step {event.step}: " + ", ".join(parts))
        elif isinstance(event, CheckpointEvent):
            self.console.print(
                f"checkpoint {event.path} ({event.bytes / 2**20:.1f} MiB in {event.seconds:.1f} s)"
            )
        elif isinstance(event, SkipEvent):
            limits = (
                ""
                if event.loss_limit is None
                else f"; limits {event.loss_limit:.4f} and {event.grad_norm_limit:.2f}"
            )
            self.console.print(
                f"step {event.step} skipped: {event.reason} (loss {event.loss:.4f}, grad norm"
                f" {event.grad_norm:.2f}{limits}), {event.in_row} in a row, {event.skipped} in all"
            )
        elif isinstance(event, RollbackEvent):
            self.console.print(
                f"rolled back to step {event.step} after bad steps {event.first_bad} to"
                f" {event.last_bad} ({event.reason}); samples {event.first_sample} to"
                f" {event.stop_sample - 1} are passed over"
            )
        elif isinstance(event, MirrorEvent):
            self._on_mirror(event)
        elif isinstance(event, SaveFailedEvent):
            self.console.print(
                f"warning: no checkpoint of step {event.step}: {event.message}; training goes on "
                f"(failed saves in a row: {event.in_row}, see checkpoint.on_failure)"
            )

    def _on_mirror(self, event: MirrorEvent) -> None:
        waiting = f"; {event.waiting} waiting" if event.waiting else ""
        if event.status == "mirrored":
            self.console.print(
                f"mirrored {event.path} ({event.bytes / 2**20:.1f} MiB in {event.seconds:.1f}"
                f" s{waiting})"
            )
        elif event.status == "failing":
            self.console.print(
                f"warning: the mirror takes no checkpoints: {event.message}; it is tried again,"
                f" training goes on{waiting}"
            )
        else:
            self.console.print(f"warning: mirror: {event.message}{waiting}")

    def _on_step(self, event: StepEvent) -> None:
        if self.progress is not None:
            short = (
                f"loss {event.loss:.3f} nats {event.bpb:.3f} bits/B {event.tokens_per_second:,.0f}"
                f" tok/s lr {event.lr:.1e} norm {event.grad_norm:.2f}"
            )
            self.progress.update(self.task, completed=event.step, description=short)
            return
        text = (
            f"loss {event.loss:.4f} nats  {event.bpb:.3f} bits/byte  {event.tokens_per_second:,.0f}"
            f" tokens/s  lr {event.lr:.2e}  grad norm {event.grad_norm:.2f}"
        )
        now = time.monotonic()
        if now - self.printed_at >= self.plain_seconds or event.step == self.last_step:
            self.printed_at = now
            done = event.step - self.first_step + 1
            left = (now - self.started) / done * (self.last_step - event.step)
            self.console.print(
                f"step {event.step}/{self.last_step}  {text}  left"
                f" {int(left // 60)}:{int(left % 60):02d}"
            )

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
