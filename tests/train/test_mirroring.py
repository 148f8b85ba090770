"""End of a job whose mirror is incomplete."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from nextpt.base.collective import RankGroup
from nextpt.base.errors import ConfigError, TrainingStopped
from nextpt.base.files import canonical_json
from nextpt.events import Event, EventBus
from nextpt.job.context import JobContext
from nextpt.job.signals import StopRequest
from nextpt.train.mirroring import MARGIN, check_same_run, mirroring, open_mirror
from tests.support.checkpoints import write
from tests.support.datasets import tiny


class Recorder:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


def stop_training(stop: StopRequest) -> None:
    stop.record(signal.SIGTERM)
    raise TrainingStopped("stopped")


@pytest.mark.parametrize("hanging", [False, True])
def test_a_stopped_job_waits_for_the_mirror_within_its_grace_period(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hanging: bool
) -> None:
    config = tiny(
        tmp_path,
        tmp_path,
        checkpoint={
            "mirror": str(tmp_path / "mirror"),
            "grace_seconds": MARGIN + (0.5 if hanging else 600.0),
        },
    )
    root, stop, listener = tmp_path / "checkpoints", StopRequest(), Recorder()
    write(root, 3)
    job = JobContext(stop)
    mirror = open_mirror(config, root, job)
    if hanging:
        mirror.archive.read_note = lambda: threading.Event().wait()
    with (
        pytest.raises(TrainingStopped, match="stopped"),
        mirroring(mirror, config, RankGroup.world(), job, EventBus([listener])),
    ):
        stop_training(stop)
    output = capsys.readouterr().out.splitlines()
    if hanging:
        assert (
            len(output) == 1
            and "not mirrored yet" in output[0]
            and "the checkpoints of steps 3; the same command continues" in output[0]
        )
    else:
        events = [(event.step, event.status) for event in listener.events]
        assert output == [] and events == [(3, "mirrored")]


def test_a_training_error_does_not_wait_for_the_mirror(tmp_path: Path) -> None:
    config = tiny(tmp_path, tmp_path, checkpoint={"mirror": str(tmp_path / "mirror")})
    mirror = open_mirror(config, tmp_path / "checkpoints", JobContext())
    mirror.archive.read_note = lambda: threading.Event().wait()
    with (
        pytest.raises(ZeroDivisionError),
        mirroring(mirror, config, RankGroup.world(), JobContext(), EventBus()),
    ):
        1 / 0  # noqa: B018


def test_an_invalid_mirror_address_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path, tmp_path, checkpoint={"mirror": "nosuch://bucket/run"})
    with pytest.raises(
        ConfigError, match=r"checkpoint.mirror: nosuch://bucket/run: .*expected a path, s3://"
    ):
        open_mirror(config, tmp_path, JobContext())


def test_a_checkpoint_of_another_run_is_named_by_its_keys(tmp_path: Path) -> None:
    config = tiny(tmp_path, tmp_path)
    other = tiny(tmp_path, tmp_path, optimizer={"lr": 1e-4}, checkpoint={"every_steps": 7})
    (tmp_path / "state.json").write_text(canonical_json({"config": other.model_dump(mode="json")}))
    with pytest.raises(
        ConfigError, match=r"it is of another run \(optimizer.lr: 0.0001 -> 0.003\)"
    ):
        check_same_run(config, tmp_path)
