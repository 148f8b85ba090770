"""Events: what a run publishes, one JSON object per line in RUN/metrics.jsonl.

`time` is seconds since 1970 by rank 0's clock. `step` is the number of completed optimizer steps.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args

from pydantic import TypeAdapter

from nextpt.base.errors import DataError, UserError, print_notice
from nextpt.base.files import atomic_write
from nextpt.base.json_files import open_regular
from nextpt.config import BatchSchedule


@dataclass(frozen=True)
class StepEvent:
    """Metrics of one logged optimizer step.

    Attributes:
        step: Number of completed steps, this one included.
        tokens: Number of tokens of all those steps.
        loss: Weighted loss without z-loss, nats per target.
        bpb: Bits per byte of the step's text tokens.
        lr: Learning rate of the step.
        grad_norm: Norm of the gradient before clipping.
        tokens_per_second: Over the steps since the last logged one.
        z_loss: Nats per target.
        data_wait_seconds: Seconds in which steps waited for batches since the last logged one.
        memory_bytes: Peak of the allocator on a GPU, resident memory of rank 0 on a CPU.
        mfu: Model FLOP utilisation, None where the peak of the device is unknown.
        noise: Estimates of the gradient noise, {"trace": tr(S), "square": |G|^2}; average both over
            many steps before dividing (train/dynamics.py). None where a step is one micro-batch.
        update_ratios: |update| / |weights| by kind of parameter.
        auxiliary_losses: Auxiliary losses of the model by name, nats per target.
        domains: Loss and bits per byte by domain.
        batch_size: Sequences of the step, over all ranks; 0 in records of before 2026-12.
    """

    step: int
    tokens: int
    loss: float
    bpb: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    z_loss: float = 0.0
    data_wait_seconds: float = 0.0
    memory_bytes: int = 0
    mfu: float | None = None
    noise: dict[str, float] | None = None
    update_ratios: dict[str, float] = field(default_factory=dict)
    auxiliary_losses: dict[str, float] = field(default_factory=dict)
    domains: dict[str, dict[str, float]] = field(default_factory=dict)
    batch_size: int = 0
    time: float = field(default_factory=time.time)
    kind: str = "train"


@dataclass(frozen=True)
class BatchEvent:
    """The batch size changed by a decision of train.batch_growth.

    Attributes:
        step: Completed steps; those after them have the new size.
        batch_size: New size, sequences over all ranks.
        noise_scale: The gradient noise scale that led to it, targets; None where the stable run
            of train.decay_from decided.
        last_step: Step after which training will end now.
    """

    step: int
    batch_size: int
    noise_scale: float | None
    last_step: int
    time: float = field(default_factory=time.time)
    kind: str = "batch"


@dataclass(frozen=True)
class ValidationEvent:
    """Metrics of the validation split after `step` steps, by domain and in total.

    Attributes:
        averages: Name of an average of the weights, such as "ema-0.999" -> its "domains" and
            "total"; empty unless `validation.averages` is set.
    """

    step: int
    tokens: int
    domains: dict[str, dict[str, float]]
    total: dict[str, float]
    averages: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    time: float = field(default_factory=time.time)
    kind: str = "validation"


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint became durable.

    Attributes:
        seconds: From the start of the save.
        stall_seconds: Those of them in which training stood still.
    """

    step: int
    path: str
    seconds: float
    bytes: int
    stall_seconds: float = 0.0
    time: float = field(default_factory=time.time)
    kind: str = "checkpoint"


@dataclass(frozen=True)
class SkipEvent:
    """A bad step that changed nothing.

    Attributes:
        step: The step.
        reason: One of spike_detector.REASONS.
        loss: Nats per target.
        grad_norm: Norm of the gradient before clipping.
        consecutive: Bad steps in a row, this one included.
        skipped: Bad steps in the whole run.
        loss_limit: Loss above which a step is a spike; None while spikes are not looked for.
        grad_norm_limit: The same of the norm.
    """

    step: int
    reason: str
    loss: float
    grad_norm: float
    consecutive: int
    skipped: int
    loss_limit: float | None = None
    grad_norm_limit: float | None = None
    time: float = field(default_factory=time.time)
    kind: str = "skip"


@dataclass(frozen=True)
class RollbackEvent:
    """Training returned to a checkpoint; records of later steps no longer hold.

    Attributes:
        step: Step of the checkpoint.
        first_bad: First of the bad steps.
        last_bad: Last of the bad steps.
        reason: Why the last of them was bad.
        first_sequence: First position of the data that is skipped (docs/loader.md).
        stop_sequence: First position after it.
        rollbacks: Rollbacks since a checkpoint was saved after one.
    """

    step: int
    first_bad: int
    last_bad: int
    reason: str
    first_sequence: int
    stop_sequence: int
    rollbacks: int
    time: float = field(default_factory=time.time)
    kind: str = "rollback"


@dataclass(frozen=True)
class SaveFailedEvent:
    """A checkpoint could not be written, and training went on without it.

    Attributes:
        rank: The first rank that failed.
        errno: The system's number of its error, None where there was none.
        consecutive: Failed saves in a row.
    """

    step: int
    message: str
    rank: int
    errno: int | None
    consecutive: int
    time: float = field(default_factory=time.time)
    kind: str = "save_failed"


@dataclass(frozen=True)
class MirrorEvent:
    """News of the mirror of the checkpoints.

    Attributes:
        status: "mirrored"; "skipped": `step` is not mirrored; "damaged": a mirrored
            checkpoint is not usable; "failing": the store accepts nothing at present; "ended":
            mirroring ended.
        path: Location of a mirrored checkpoint.
        seconds: Duration of its upload.
        bytes: Its size.
        waiting: Checkpoints that are not mirrored yet.
    """

    step: int
    status: str
    message: str = ""
    path: str = ""
    seconds: float = 0.0
    bytes: int = 0
    waiting: int = 0
    time: float = field(default_factory=time.time)
    kind: str = "mirror"


Event = (
    StepEvent
    | BatchEvent
    | ValidationEvent
    | CheckpointEvent
    | SkipEvent
    | RollbackEvent
    | SaveFailedEvent
    | MirrorEvent
)


class Listener(Protocol):
    """Anything that receives events, in order."""

    def on_event(self, event: Event) -> None:
        """Receive an event."""

    def close(self) -> None:
        """No more events will come."""


class EventBus:
    """Delivers each event to all listeners, in the order in which they subscribed.

    Every rank publishes the same events; only rank 0 has listeners.
    """

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self._listeners = list(listeners)

    def subscribe(self, listener: Listener) -> None:
        """Deliver later events to a listener too."""
        self._listeners.append(listener)

    def publish(self, event: Event) -> None:
        """Deliver an event."""
        for listener in self._listeners:
            listener.on_event(event)

    def close(self) -> None:
        """Close all listeners."""
        for listener in self._listeners:
            listener.close()


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event by flat name (`train/loss`, `validation/code/bpb`), for trackers.

    Step and time are the axis and left out, as are unknown values (None).
    """
    numbers: dict[str, float] = {}

    def walk(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(prefix if name == "domains" else f"{prefix}{name}/", value)
            elif isinstance(value, (int, float)):
                numbers[prefix + name] = float(value)

    walk(
        f"{event.kind}/",
        {k: v for k, v in asdict(event).items() if k not in ("step", "time", "kind")},
    )
    return numbers


class MetricsFile:
    """Appends events to metrics.jsonl; the keys of a training record are at the top level.

    Records of steps that will be made again are removed: at construction those after
    `resume_step`, at a rollback those after its step. Damaged lines are removed then too.

    What the disk refuses is kept and written with the next event. As with checkpoints, that many
    saves in a row may pass meanwhile.

    Args:
        path: The file; created where it is missing.
        resume_step: Step of the checkpoint that the run resumes from, 0 for a new run.
        max_failures: Consecutive saves without a successful write that end training; 0 ends it at
            the first refused write.
    """

    def __init__(self, path: Path, resume_step: int, max_failures: int = 0) -> None:
        self.path = path
        self.max_failures = max_failures
        self._pending: list[str] = []
        self._rollback_step: int | None = None  # step of a rollback that the file does not show yet
        self._is_failing = False
        self._failures = 0
        # Size of the file after the last successful write. Only after a failed one is the file cut
        # to it: another job that took over the run folder may have written since.
        self._size = self._truncate(resume_step)

    def _truncate(self, last_step: int) -> int:
        """Remove the records of later steps; returns the size of the file."""
        kept = [line for line, record in _read_lines(self.path) if record["step"] <= last_step]
        data = b"".join(line + b"\n" for line in kept)
        with atomic_write(self.path, "wb") as file:
            file.write(data)
        return len(data)

    def on_event(self, event: Event) -> None:
        """Append an event.

        Raises:
            UserError: The disk has refused for too long.
        """
        if isinstance(event, RollbackEvent):
            self._rollback_step = event.step
            self._pending = [
                line for line in self._pending if json.loads(line)["step"] <= event.step
            ]
        self._pending.append(json.dumps(asdict(event), sort_keys=True) + "\n")
        try:
            self._write()
        except OSError as error:
            self._record_failure(error, isinstance(event, CheckpointEvent | SaveFailedEvent))
        else:
            self._is_failing, self._failures = False, 0

    def _write(self) -> None:
        if self._rollback_step is not None:
            self._size = self._truncate(self._rollback_step)
            self._rollback_step = None
        data = "".join(self._pending).encode()
        with open(self.path, "ab") as file:
            if self._is_failing and file.tell() > self._size:  # part of a write that failed
                file.truncate(self._size)
            file.write(data)
            file.flush()
            self._size = file.tell()
        self._pending = []

    def _record_failure(self, error: OSError, is_save: bool) -> None:
        problem = f"{self.path} cannot be written: {error.strerror or error}"
        self._failures += is_save
        if self._failures >= self.max_failures:
            raise UserError(f"{problem}; free some space, the same command resumes") from error
        if not self._is_failing:
            self._is_failing = True
            print_notice(
                f"warning: {problem}; its records are kept and written later, training goes on (see"
                " checkpoint.on_failure)"
            )

    def close(self) -> None:
        """Write what is left; says so where that fails."""
        try:
            if self._pending:
                self._write()
        except OSError as error:
            print_notice(
                f"warning: {self.path} lacks the last {len(self._pending)} records:"
                f" {error.strerror or error}"
            )


# Keys of files written before 2026-12, and what they are called now
RENAMED_KEYS = {
    "bpb_text": "bpb",
    "bpb_code": "bpb_with_eod",
    "in_row": "consecutive",
    "first_sample": "first_sequence",
    "stop_sample": "stop_sequence",
}
RENAMED_STATUSES = {"passed over": "skipped"}  # of mirror events
METRICS = {"nats_per_token", "bpb"}  # that every part of a record has
LARGEST_STEP = 2**63  # above any step that can be reached; a larger number is damage


def rename_old_keys(value: Any) -> Any:
    """Return a JSON value with the keys of older files replaced by today's, at any depth."""
    if isinstance(value, dict):
        return {RENAMED_KEYS.get(k, k): rename_old_keys(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rename_old_keys(item) for item in value]
    return value


def read_events(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read all records of a metrics file, or those of one kind, under today's names.

    Damaged lines are skipped and reported, a torn last line (of a killed run) is only skipped.

    Raises:
        DataError: The file cannot be read.
    """
    records = [record for _, record in _read_lines(path)]
    return [record for record in records if kind is None or record["kind"] == kind]


def decided_batches(planned: BatchSchedule, records: Iterable[Mapping[str, Any]]) -> BatchSchedule:
    """Batch size by step of a run, with the decisions of train.batch_growth among its records."""
    for record in records:
        if record["kind"] == "batch":
            planned = planned.with_change(record["step"], record["batch_size"])
    return planned


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines of a metrics file and their records, without damaged ones; none without a file."""
    try:
        with open_regular(path, follow_links=True) as file:
            lines = file.read().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    kept, damaged = [], 0
    for number, line in enumerate(lines, 1):
        if record := _parse(line):
            kept.append((line, record))
        elif line and number < len(lines):
            damaged += 1
    if damaged:
        _report_damage(path, damaged)
    return kept


@functools.cache
def _report_damage(path: Path, lines: int) -> None:
    """Print once that a file has damaged lines, however often this process reads it."""
    print_notice(f"warning: {path} has {lines} damaged line{'s' if lines > 1 else ''}; skipped")


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for one that is torn, damaged or no event."""
    try:
        written = json.loads(line.decode())
        record = rename_old_keys(written)
        kind, step = record["kind"], record["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(kind, str) or type(step) is not int or not 0 <= step < LARGEST_STEP:
        return None
    if record.get("status") in RENAMED_STATUSES:
        record["status"] = RENAMED_STATUSES[record["status"]]
    text = line if record == written else json.dumps(record).encode()
    return record if _has_fields(kind, record, text) else None


def _has_fields(kind: str, record: dict[str, Any], text: bytes) -> bool:
    """Whether a record has the fields of its kind, with their types; of a newer kind, any.

    Args:
        kind: Of the record.
        record: The record, by today's names.
        text: It as JSON, whose types are stricter than Python's.
    """
    adapter = _adapters().get(kind)
    if adapter is None:
        return True
    try:
        adapter.validate_json(text, strict=True)
    except ValueError:  # pydantic's error is one
        return False
    if kind == "train" and not record["tokens_per_second"] > 0:
        return False
    averages = record.get("averages", {}).values()
    if not all(average.keys() >= {"domains", "total"} for average in averages):
        return False
    measured = [record, *averages]
    parts = [part for r in measured for part in r.get("domains", {}).values()]
    parts += [r["total"] for r in measured if "total" in r]
    return all(part.keys() >= METRICS for part in parts)


@functools.cache
def _adapters() -> dict[str, TypeAdapter[Event]]:
    """Validators of the events, by kind."""
    return {vars(event)["kind"]: TypeAdapter(event) for event in get_args(Event)}
