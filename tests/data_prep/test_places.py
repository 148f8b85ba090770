"""Locations of inputs and workers: object stores, Ray, this machine; memory of a worker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.dry_run import dry_run
from data_prep.format import DatasetManifest
from data_prep.prepare import prepare as prepare_anywhere
from data_prep.workers import RayWorkers
from nextpt.base.errors import DataPrepError
from nextpt.base.stores import open_store
from tests.support.object_store import s3_server
from tests.support.prep_worlds import content, prepare, small_units, texts, world, write_lines


@pytest.mark.thorough
def test_inputs_in_an_object_store_give_the_same_dataset(tmp_path: Path) -> None:
    spec = world(tmp_path, 40)
    prepare(spec)
    with s3_server("bucket"):
        store, _ = open_store("s3://bucket")
        for name, path in (
            ("in/a/1.jsonl", "a/1.jsonl"),
            ("in/a/2.jsonl", "a/2.jsonl"),
            ("in/b.jsonl", "b.jsonl"),
        ):
            with store.open_output_stream(f"bucket/{path}") as stream:
                stream.write((tmp_path / name).read_bytes())
        remote = spec.model_copy(
            update={
                "domains": {"a": "s3://bucket/a/*.jsonl", "b": "s3://bucket/b.jsonl"},
                "output": tmp_path / "remote",
            }
        )
        prepare(remote)
        with pytest.raises(DataPrepError, match="s3://bucket/c"):
            prepare(
                remote.model_copy(
                    update={"domains": {"a": "s3://bucket/c"}, "output": tmp_path / "none"}
                )
            )
    ours, theirs = content(spec.output), content(remote.output)
    assert {k: v for k, v in ours.items() if k != "dataset.json"} == {
        k: v for k, v in theirs.items() if k != "dataset.json"
    }
    assert (
        DatasetManifest.load(spec.output).fingerprint
        == DatasetManifest.load(remote.output).fingerprint
    )


@pytest.mark.thorough
def test_a_dry_run_writes_nothing_and_prints_the_plan(tmp_path: Path) -> None:
    spec = world(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with small_units():
        estimate = dry_run(spec, 3)
    assert sorted(tmp_path.rglob("*")) == before
    text = "\n".join(estimate.lines())
    assert "3 files" in text and "with 3 workers" in text and "nothing was written" in text
    with small_units():
        manifest = prepare(spec)
    tokens = sum(c.text_tokens for domains in manifest.splits.values() for c in domains.values())
    assert 0.6 < estimate.tokens / tokens < 1.7
    assert "nothing would be done" in "\n".join(dry_run(spec, 1).lines())


@pytest.mark.slow
def test_a_local_ray_cluster_gives_the_same_dataset(tmp_path: Path) -> None:
    spec = world(tmp_path, 40)
    prepare(spec)
    by_ray = spec.model_copy(update={"output": tmp_path / "by_ray"})
    prepare_anywhere(by_ray, workers=RayWorkers(None, 2))
    assert content(by_ray.output) == content(spec.output)
    write_lines(tmp_path / "in/b.jsonl", ["x"])
    (tmp_path / "in/b.jsonl").write_text("no\n")
    with pytest.raises(DataPrepError, match="records are bad"):
        prepare_anywhere(
            by_ray.model_copy(update={"output": tmp_path / "bad"}), workers=RayWorkers(None, 1)
        )


MEASURE = """
import re, sys
from pathlib import Path
from data_prep.prepare import prepare
from data_prep.spec import PrepSpec
from data_prep.workers import LocalWorkers
prepare(PrepSpec.model_validate_json(Path(sys.argv[1]).read_text()), workers=LocalWorkers(1))
# Not getrusage: its maximum begins at what the process that started this one had.
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_a_worker_takes_less_than_a_gibibyte(tmp_path: Path) -> None:
    """The input is one file of 120 MB with a line of 40 MB and one that is too long."""
    spec = world(tmp_path)
    contents = texts(2000, 3)
    with open(tmp_path / "big.jsonl", "w") as file:
        for i in range(80_000_000 // sum(map(len, contents))):
            file.writelines(json.dumps({"text": f"{i} {text}"}) + "\n" for text in contents)
        file.write(json.dumps({"text": "word " * 8_000_000}) + "\n")
        file.write('{"text": "' + "x" * 140_000_000 + '"}\n')
    spec = spec.model_copy(
        update={
            "domains": {"big": tmp_path / "big.jsonl"},
            "sequence_length": 2048,
            "max_bad_fraction": 0.001,
        }
    )
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    completed = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "spec.json")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert completed.returncode == 0, completed.stderr
    assert int(completed.stdout) < 2**20  # KiB
    assert "line too long" in (spec.output / "quarantine.jsonl").read_text()
