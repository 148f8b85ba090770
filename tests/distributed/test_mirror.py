"""Real jobs on two gloo ranks whose mirror, an S3, is unreachable for a while."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch

from nextpt.checkpoint.folders import steps
from nextpt.checkpoint.mirror.archive import Archive
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import Config, to_yaml
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.object_store import s3_server
from tests.support.proxy import proxy
from tests.support.ranks import start_ranks, train_all

pytestmark = pytest.mark.slow
STEPS = 8


def state(run: Path) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = open_checkpoint(run / "checkpoints")
    assert checkpoint.step == STEPS
    return {
        (name, kind): checkpoint.read_whole(name, kind)
        for name, kinds in checkpoint.state_shapes().items()
        for kind in kinds
    }


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_events(run / "metrics.jsonl", "train")]


def test_an_outage_and_a_lost_disk_leave_no_trace_in_the_training(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(name: str, **changes: object) -> Config:
        return tiny(
            dataset,
            tmp_path / name,
            train={"steps": STEPS, "zero_stage": 1} | changes.pop("train", {}),
            checkpoint={"every_steps": 1, "keep_last": 2, "asynchronous": True} | changes,
        )

    with s3_server("bucket") as server, proxy(server) as link:
        monkeypatch.setenv("S3_ENDPOINT_URL", link.address)
        uri = "s3://bucket/run"
        plain = job("plain")
        mirrored = job("mirrored", mirror=uri, train={"stop_at": 6})
        wrong = job("wrong", mirror="s3://nowhere/run")
        ends = train_all([plain, wrong], 2, tmp_path / "logs")
        assert (
            ends[0] is None
            and "checkpoint.mirror: s3://nowhere/run: there is no such bucket" in ends[1]
        )
        assert not (tmp_path / "wrong" / "metrics.jsonl").exists()

        (tmp_path / "mirrored.yaml").write_text(to_yaml(mirrored))
        switch = tmp_path / "switch"
        ranks = start_ranks(
            [["-m", "tests.support.mirror_probe", str(switch), str(tmp_path / "mirrored.yaml")]]
            * 2,
            tmp_path / "outage",
        )
        modes = {1: "pass", 2: "refuse", 3: "503", 4: "hang", 5: "pass", 6: "pass"}
        deadline = time.monotonic() + 900
        for step, mode in modes.items():
            while not switch.exists():
                assert time.monotonic() < deadline and all(r.poll() is None for r in ranks), (
                    tmp_path / "outage" / "rank-0.log"
                ).read_text()
                time.sleep(0.01)
            assert switch.read_text() == str(step)
            if mode != link.mode:
                link.mode = mode
            switch.unlink()
        assert [r.wait(900) for r in ranks] == [0, 0]
        assert {stored.step for stored in Archive(uri).checkpoints() if stored.complete} == {5, 6}

        # The disk is lost; the losses so far are kept for the comparison
        shutil.rmtree(tmp_path / "mirrored" / "checkpoints")
        assert train_all([job("mirrored", mirror=uri)], 2, tmp_path / "back") == [None]
        assert (
            f"step 6 fetched from the mirror {uri}"
            in (tmp_path / "back" / "rank-0.log").read_text()
        )
        assert [stored.step for stored in Archive(uri).checkpoints()] == [8, 7]
    assert (
        losses(tmp_path / "mirrored") == losses(tmp_path / "plain")
        and len(losses(tmp_path / "plain")) == STEPS
    )
    expected, actual = state(tmp_path / "plain"), state(tmp_path / "mirrored")
    assert [
        key for key in expected if not torch.equal(expected[key], actual[key])
    ] == [] and 8 in steps(tmp_path / "mirrored" / "checkpoints")
    # The newest goes first: step 7 may follow step 8 where both were waiting
    events = read_events(tmp_path / "mirrored" / "metrics.jsonl", "mirror")
    assert {7, 8} <= {event["step"] for event in events if event["status"] == "mirrored"}
