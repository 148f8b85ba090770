"""Trackers with their real libraries: events are read back as users read them."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tenacity import Retrying, stop_after_delay, wait_fixed

from nextpt.base.errors import ConfigError, UserError
from nextpt.config import Config
from nextpt.events import (
    CheckpointEvent,
    MetricsFile,
    RollbackEvent,
    SkipEvent,
    StepEvent,
    ValidationEvent,
    read_events,
    scalars,
)
from nextpt.observe.trackers import check_trackers, open_trackers
from nextpt.observe.trackers.choice import FailSafeTracker
from tests.support.datasets import tiny
from tests.support.ranks import train_all

DOMAINS = {"code": {"nats_per_token": 2.0, "bpb": 1.0}}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wandb gives its process 30 seconds to start, which a loaded machine exceeds."""
    monkeypatch.setenv("WANDB_X_SERVICE_WAIT", "300")


def step_event(step: int, loss: float) -> StepEvent:
    return StepEvent(
        step,
        100 * step,
        loss,
        1.5,
        1e-3,
        0.5,
        1000.0,
        domains={"code": {"nats_per_token": loss, "bpb": 1.0}},
    )


def config_with(dataset: Path, run: Path, **trackers: Any) -> Config:
    return tiny(dataset, run, trackers=trackers)


def log(config: Config, first_step: int, steps: range) -> None:
    """A start that logs these steps and ends."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    for tracker in (opened := open_trackers(config, first_step)):
        for step in steps:
            tracker.on_event(step_event(step, 10.0 / step + first_step))
        tracker.on_event(ValidationEvent(steps[-1], 100, DOMAINS, DOMAINS["code"]))
        tracker.on_event(CheckpointEvent(steps[-1], "x", 0.5, 2**20))
        tracker.close()
    assert len(opened) == 1


def test_scalars_are_flat_and_leave_out_what_is_not_known() -> None:
    values = scalars(step_event(3, 2.5))
    assert (
        values["train/loss"] == 2.5
        and values["train/code/nats_per_token"] == 2.5
        and values["train/tokens"] == 300
    )
    assert "train/mfu" not in values and "train/step" not in values and "train/time" not in values
    averages = {"ema-0.99": {"domains": DOMAINS, "total": {"bpb": 0.9}}}
    values = scalars(ValidationEvent(1, 100, DOMAINS, {"bpb": 1.0}, averages))
    assert values["validation/total/bpb"] == values["validation/code/bpb"] == 1.0
    assert values["validation/averages/ema-0.99/total/bpb"] == 0.9
    assert values["validation/averages/ema-0.99/code/nats_per_token"] == 2.0


def test_tensorboard_reads_the_curves_and_a_resume_hides_repeated_steps(
    dataset: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_with(dataset, tmp_path / "run", tensorboard=True)
    log(config, 1, range(1, 7))
    log(config, 4, range(4, 9))
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    reader.Reload()
    losses = {e.step: e.value for e in reader.Scalars("train/loss")}
    assert (
        list(losses) == list(range(1, 9))
        and losses[3] == pytest.approx(10 / 3 + 1)
        and losses[4] == pytest.approx(10 / 4 + 4)
    )
    assert {"validation/code/bpb", "checkpoint/seconds", "train/lr"} <= set(
        reader.Tags()["scalars"]
    )


def test_a_rollback_hides_repeated_steps(dataset: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_with(dataset, tmp_path / "run", tensorboard=True)
    config.run_dir.mkdir()
    listeners = [*open_trackers(config, 1), MetricsFile(tmp_path / "run" / "metrics.jsonl", 0)]
    events = [
        *(step_event(step, 1.0) for step in range(1, 5)),
        SkipEvent(4, "loss not finite", math.nan, math.inf, 1, 1),
        RollbackEvent(2, 4, 4, "loss not finite", 16, 32, 1),
        *(step_event(step, 2.0) for step in range(3, 6)),
    ]
    for listener in listeners:
        for event in events:
            listener.on_event(event)
        listener.close()
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    reader.Reload()
    assert [(e.step, e.value) for e in reader.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
        (5, 2.0),
    ]
    assert [(e["kind"], e["step"]) for e in read_events(tmp_path / "run" / "metrics.jsonl")] == [
        ("train", 1),
        ("train", 2),
        ("rollback", 2),
        ("train", 3),
        ("train", 4),
        ("train", 5),
    ]


@pytest.mark.thorough
def test_mlflow_continues_the_same_run(dataset: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    config = config_with(dataset, tmp_path / "run", mlflow={"experiment": "tests"})
    log(config, 1, range(1, 4))
    log(config, 3, range(3, 6))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert len(runs) == 1 and runs[0].info.status == "FINISHED" and runs[0].info.run_name == "tiny"
    assert runs[0].data.params["model.depth"] == "2" and runs[0].data.metrics[
        "train/loss"
    ] == pytest.approx(10 / 5 + 3)
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    assert [m.step for m in history] == [1, 2, 3, 3, 4, 5]
    assert (tmp_path / "run" / "mlflow_id").read_text().strip() == runs[0].info.run_id


def wandb_records(folder: Path) -> list[Any]:
    """Records of an offline run file: LevelDB's log format, 32 KiB blocks, a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    data, offset, records, parts = path.read_bytes(), 7, [], b""
    while offset + 7 <= len(data):
        remaining = 32768 - offset % 32768
        if remaining < 7:
            offset += remaining
            continue
        length, kind = struct.unpack_from("<HB", data, offset + 4)
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.process
def test_wandb_offline_writes_what_sync_sends(dataset: Path, tmp_path: Path) -> None:
    config = config_with(dataset, tmp_path / "run", wandb={"project": "tests", "mode": "offline"})
    log(config, 1, range(1, 4))
    # Another process writes the file, and may not have written all of it when the run has finished
    for attempt in Retrying(stop=stop_after_delay(300), wait=wait_fixed(0.1), reraise=True):
        with attempt:
            records = wandb_records(tmp_path / "run")
            assert records[-1].WhichOneof("record_type") == "exit"
    rows = [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {s: pytest.approx(10 / s + 1) for s in (1, 2, 3)}
    [run] = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (
        run.project == "tests" and run.run_id == (tmp_path / "run" / "wandb_id").read_text().strip()
    )
    names = {p.name for p in (tmp_path / "run" / "wandb").rglob("*") if p.is_file()}
    assert not any(name.endswith((".patch", ".py")) for name in names)
    log(config, 3, range(3, 5))
    assert (tmp_path / "run" / "wandb_id").read_text().strip() == run.run_id


def test_wandb_online_without_a_key_is_an_error_and_no_prompt(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        open_trackers(config_with(dataset, tmp_path / "run", wandb={"project": "tests"}), 1)


@pytest.mark.process
def test_a_missing_library_is_named_before_training(dataset: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['tensorboard'] = None\nfrom importlib import util; find ="
        " util.find_spec\nutil.find_spec = lambda n, *a: None if n == 'tensorboard' else find(n,"
        " *a)\nfrom nextpt.config import load_config; from nextpt.observe.trackers import"
        " check_trackers\ncheck_trackers(load_config(sys.argv[1]))"
    )
    from nextpt.config import to_yaml

    (tmp_path / "c.yaml").write_text(
        to_yaml(config_with(dataset, tmp_path / "run", tensorboard=True))
    )
    completed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "c.yaml")], capture_output=True, text=True
    )
    assert (
        "trackers.tensorboard: tensorboard is not installed; pip install 'nextpt[trackers]'"
        in completed.stderr
    )
    check_trackers(config_with(dataset, tmp_path / "run"))


def test_a_tracker_that_cannot_start_is_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trackers.mlflow cannot start: "):
        open_trackers(
            config_with(
                dataset, tmp_path / "run", mlflow={"experiment": "x", "uri": "nonsense://x"}
            ),
            1,
        )


def test_a_tracker_that_fails_is_dropped_with_one_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Broken:
        calls = 0

        def on_event(self, event: object) -> None:
            self.calls += 1
            raise OSError("no space left")

        def close(self) -> None:
            self.calls += 1

    broken = Broken()
    guarded = FailSafeTracker("broken", broken)
    for step in (1, 2):
        guarded.on_event(step_event(step, 1.0))
    guarded.close()
    warning = capsys.readouterr().err
    assert (
        broken.calls == 1
        and warning.count("\n") == 1
        and "broken stopped (OSError: no space left)" in warning
    )


@pytest.mark.process
def test_a_training_writes_all_of_them_and_the_start(dataset: Path, tmp_path: Path) -> None:
    """Two ranks, stopped and resumed: one run in every tracker, two starts, equal losses."""
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = {
        "tensorboard": True,
        "mlflow": {"experiment": "e"},
        "wandb": {"project": "p", "mode": "offline"},
    }
    os.environ["WANDB_SILENT"] = "true"
    run = tmp_path / "run"
    first = tiny(dataset, run, trackers=trackers, train={"stop_at": 3})
    assert train_all([first, tiny(dataset, run, trackers=trackers)], 2, tmp_path / "jobs") == [
        None,
        None,
    ]
    losses = {e["step"]: e["loss"] for e in read_events(run / "metrics.jsonl", "train")}
    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    assert {
        e.step: pytest.approx(e.value, rel=1e-6) for e in reader.Scalars("train/loss")
    } == losses
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    history = client.get_metric_history((run / "mlflow_id").read_text().strip(), "train/loss")
    assert {m.step: m.value for m in history} == losses and all(
        math.isfinite(v) for v in losses.values()
    )
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [s["first_step"] for s in starts] == [1, 4] and starts[0]["world_size"] == 2
    assert sum(starts[0]["hosts"].values()) == 2 and starts[0]["versions"]["torch"]
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    assert "Traceback" not in "".join(p.read_text() for p in (tmp_path / "jobs").glob("*.log"))


@pytest.mark.process
def test_without_json_lines_there_is_no_file(dataset: Path, tmp_path: Path) -> None:
    assert train_all(
        [tiny(dataset, tmp_path / "run", trackers={"jsonl": False})], 1, tmp_path / "jobs"
    ) == [None]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
