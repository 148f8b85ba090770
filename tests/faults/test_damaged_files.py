"""Every file that a command reads, damaged: the right result or one line that says what is wrong.

`make fuzz` tries 100,000 damaged inputs of each kind (NEXTPT_FUZZ); the tests 40, and in `make
test-slow` 150.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from data_prep.documents import read_documents
from data_prep.tokenizer import Tokenizer
from launcher.jobs.hosts import read_hostfile
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import load_config
from nextpt.data.dataset import open_sequences
from nextpt.evaluate.coding.files import FileCoder
from nextpt.evaluate.loaded_model import open_model
from nextpt.exchange import export_hf
from nextpt.observe.run_record import read_runs
from nextpt.scaling.fitting import Fit, fit
from nextpt.scaling.frontier import Frontier
from nextpt.scaling.ladder import read_result
from nextpt.scaling.laws import LAWS
from nextpt.scaling.observations import Runs
from nextpt.scaling.predict import on_corpus, plan_budget, predict
from nextpt.scaling.record import fit_json, frontier_json, read_fit, repeated_json
from nextpt.scaling.repeats import NAMES, RepeatedFit
from tests.support.confined import read_confined
from tests.support.damage import Edit, apply, edits
from tests.support.datasets import make_dataset, tiny
from tests.support.ranks import train_all
from tests.support.runs import make_run

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = int(os.environ.get("NEXTPT_FUZZ", "0"))
BATCH = 2_000  # of one run of Hypothesis, which remembers all its examples
TEXT = b"Some text, and more of it.\n" * 8


def config(folder: Path) -> Callable[[Path], object]:
    shutil.copy(ROOT / "configs" / "7b.yaml", folder / "config.yaml")
    return lambda folder: load_config(folder / "config.yaml")


def run(folder: Path) -> Callable[[Path], object]:
    """A run folder that is trained; its checkpoints are a kind of their own."""
    with tempfile.TemporaryDirectory() as other:
        data = make_dataset(Path(sysconfig.get_path("stdlib")) / "json", Path(other) / "data")
        train = {"train": {"steps": 3}, "validation": {"every_steps": 2}}
        assert train_all([tiny(data, folder, **train)], 1, Path(other) / "ranks") == [None]
    shutil.rmtree(folder / "checkpoints")

    def read(folder: Path) -> None:
        for record in read_runs([folder]):
            _ = record.status, record.seconds, record.median_rate(), record.batch_tokens

    return read


def checkpoint(folder: Path) -> Callable[[Path], object]:
    make_run(folder / "run")

    def read(folder: Path) -> None:
        opened = open_checkpoint(folder / "run" / "checkpoints", warn=lambda _: None)
        for name in opened.shapes():
            opened.read_whole(name)
        opened.close()
        open_model(folder / "run")

    return read


def dataset(folder: Path) -> Callable[[Path], object]:
    with tempfile.TemporaryDirectory() as other:
        data = make_dataset(Path(sysconfig.get_path("stdlib")) / "json", Path(other))
        shutil.copytree(data, folder / "data")

    def read(folder: Path) -> None:
        for split in ("train", "validation"):
            for sequences in open_sequences(folder / "data", split).values():
                for index in range(len(sequences)):
                    _ = sequences[index]

    return read


def tokenizer(folder: Path) -> Callable[[Path], object]:
    make_run(folder / "run")
    shutil.copy(folder / "run" / "tokenizer.json", folder)
    shutil.rmtree(folder / "run")

    def read(folder: Path) -> None:
        opened = Tokenizer(folder / "tokenizer.json")
        opened.decode(opened.encode(TEXT.decode()))

    return read


def compressed(folder: Path) -> Callable[[Path], object]:
    with tempfile.TemporaryDirectory() as other:
        _, model, opened = make_run(Path(other) / "run")
        coder = FileCoder(model, opened)
        (folder / "file.nxpt").write_bytes(coder.encode(TEXT[:40])[0])

    def read(folder: Path) -> None:
        data = coder.decode((folder / "file.nxpt").read_bytes(), "file.nxpt")
        assert data == TEXT[:40]

    return read


def scaling_fit(folder: Path) -> Callable[[Path], object]:
    """A file of each form: a law, a frontier, and a law of repeated data."""
    law = LAWS["chinchilla"]
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    loss = 1.7 + 400 / n**0.34 + 2000 / d**0.37
    runs = Runs(n, d, loss, [f"run {i}" for i in range(len(n))], "synthetic")
    frontier = Frontier("isoflop", runs, [], 0.5, -1.2, np.array([[0.49, -1.0], [0.51, -1.3]]), [])
    constants = dict(zip(NAMES, (400.0, 2000.0, 1.7, 0.34, 0.37, 5.3, 15.4), strict=True))
    resamples = {name: np.array([value, 1.01 * value]) for name, value in constants.items()}
    repeated = RepeatedFit(replace(runs, unique_tokens=d / 2), constants, 0.1, 1e-3, resamples, [])
    for name, content in (
        ("law", fit_json(fit(law, runs, bootstrap=2))),
        ("frontier", frontier_json(frontier)),
        ("repeated", repeated_json(repeated)),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))

    def read(folder: Path) -> None:
        of_law = read_fit(folder / "law.json")
        if isinstance(of_law, Fit):
            predict(of_law, 1e9, 2e10, 0.9)
        plan_budget(on_corpus(of_law, None), 1e21, 0.9)
        plan_budget(on_corpus(read_fit(folder / "frontier.json"), None), 1e21, 0.9)
        plan_budget(on_corpus(read_fit(folder / "repeated.json"), 1e10), 1e21, 0.9)

    return read


def hostfile(folder: Path) -> Callable[[Path], object]:
    (folder / "hosts").write_text("# the cluster\nnode-1 slots=8\n\nnode-2.local slots=4\n")
    return lambda folder: read_hostfile(folder / "hosts")


def prediction(folder: Path) -> Callable[[Path], object]:
    values = {"loss": 3.667, "interval": [3.424, 3.866], "warnings": [], "fit": {"E": 1.7}}
    (folder / "prediction.json").write_text(json.dumps(values))
    return lambda folder: read_result(folder / "prediction.json")


def hugging_face(folder: Path) -> Callable[[Path], object]:
    make_run(folder / "run")
    export_hf(
        open_checkpoint(folder / "run" / "checkpoints"),
        folder / "run" / "tokenizer.json",
        folder / "model",
    )
    shutil.rmtree(folder / "run")
    return lambda folder: open_model(folder / "model")


def corpus(folder: Path) -> Callable[[Path], object]:
    records = [{"id": str(i), "text": TEXT.decode(), "meta": {"n": i}} for i in range(8)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    pq.write_table(pa.Table.from_pylist(records), folder / "texts.parquet")
    (folder / "more.jsonl.gz").write_bytes(gzip.compress((folder / "texts.jsonl").read_bytes()))
    return lambda folder: list(read_documents(folder))


KINDS = (
    config,
    run,
    checkpoint,
    dataset,
    tokenizer,
    compressed,
    scaling_fit,
    hostfile,
    prediction,
    hugging_face,
    corpus,
)


def files_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of modification of each file, and of what else is no folder."""
    files = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            files[os.path.relpath(path, folder)] = (
                status.st_ino,
                status.st_size,
                status.st_mtime_ns,
            )
    return files


def check(make: Callable[[Path], Callable[[Path], object]], examples: int, folder: Path) -> None:
    """Read `examples` damaged copies of what `make` writes, which is whole in the first one."""
    whole, work = folder / "whole", folder / "work"
    whole.mkdir()
    read = make(whole)
    contents = {str(p.relative_to(whole)): p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    names = sorted(contents)
    shutil.copytree(whole, work)
    state = files_of(work)

    def restore(damaged: str) -> None:
        """Write the damaged file again, and all files where the reader changed others."""
        nonlocal state
        (work / damaged).write_bytes(contents[damaged])
        status = os.stat(work / damaged)
        state[damaged] = status.st_ino, status.st_size, status.st_mtime_ns
        if files_of(work) != state:
            shutil.rmtree(work)
            shutil.copytree(whole, work)
            state = files_of(work)

    damages = st.tuples(st.sampled_from(names), st.lists(edits(), min_size=1, max_size=3))

    def batch(number: int, size: int) -> None:
        @seed(number)
        @settings(
            max_examples=size,
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(damages)
        def test(damage: tuple[str, list[Edit]]) -> None:
            try:
                apply(work / damage[0], damage[1])
                read_confined(read, work, folder)
            finally:
                restore(damage[0])

        test()

    (folder / "scratch").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        # Temporary files go to a folder in which the readers may write
        patch.setenv("TMPDIR", str(folder / "scratch"))
        patch.setattr(tempfile, "tempdir", None)
        assert read_confined(read, work, folder) is None
        for number, first in enumerate(range(0, examples, BATCH)):
            batch(number, min(BATCH, examples - first))


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_few_damaged_files(
    make: Callable[[Path], Callable[[Path], object]], tmp_path: Path
) -> None:
    check(make, 40, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_many_damaged_files(
    make: Callable[[Path], Callable[[Path], object]], tmp_path: Path
) -> None:
    check(make, EXAMPLES or 150, tmp_path)
