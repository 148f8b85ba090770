"""Compatibility: datasets and preparations from before format version 3 are read and continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_prep import stages
from data_prep.format import FORMAT_VERSION, DatasetManifest
from data_prep.prepare import is_current
from data_prep.stored import read_sequences, shards_of
from data_prep.token_weights import add_token_weights
from data_prep.upload import upload
from nextpt.base.errors import DataPrepError
from nextpt.data.loader import Loader
from nextpt.data.sequences import load_manifest
from nextpt.evaluate.texts import validation_texts
from tests.support.datasets import tiny
from tests.support.older_names import dataset_of_version_2, work_of_version_2
from tests.support.prep_worlds import content, prepare, small_units, world

FIXTURES = Path(__file__).parents[1] / "fixtures" / "before_field_names"


@pytest.fixture(scope="module")
def old(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("version-2") / "dataset"
    return dataset_of_version_2(Path(shutil.copytree(dataset, copy)))


def batches(path: Path, remote: Path | None = None) -> list[bytes]:
    """Tokens of the first training steps and of the validation split."""
    data = {"remote": str(remote) if remote else None}
    loader = Loader(tiny(path, Path("unused"), data=data), 0, 1)
    train = [batch for step in range(4) for batch in loader.step_batches(step)]
    validation = [batch for domain in (0, 1) for batch in loader.validation_batches(domain, 9)]
    loader.close()
    loader.dataset.threads.shutdown(wait=True)
    return [batch.tokens.numpy().tobytes() for batch in (*train, *validation)]


def test_the_fingerprint_is_the_one_that_checkpoints_recorded() -> None:
    manifest = load_manifest(FIXTURES / "dataset")
    states = sorted(FIXTURES.glob("run*/checkpoints/*/state.json"))
    recorded = {json.loads(path.read_text())["data"]["dataset"] for path in states}
    assert recorded == {manifest.fingerprint} == {manifest.content_sha256()}


def test_an_old_dataset_is_the_new_one_under_other_names(dataset: Path, old: Path) -> None:
    manifest = load_manifest(old)
    assert (manifest.format_version, manifest.text_folder) == (2, "heldout_text")
    assert manifest.model_copy(update={"format_version": 3}) == load_manifest(dataset)
    assert manifest.content_sha256() == load_manifest(dataset).content_sha256()
    assert batches(old) == batches(dataset)
    assert validation_texts(old) == validation_texts(dataset)


def test_an_old_dataset_is_uploaded_and_fetched(dataset: Path, old: Path, tmp_path: Path) -> None:
    upload(old, str(tmp_path / "remote"))
    assert content(tmp_path / "remote") == content(old)
    assert batches(tmp_path / "cache", tmp_path / "remote") == batches(dataset)
    assert validation_texts(tmp_path / "cache") == validation_texts(dataset)


def test_token_weights_on_an_old_dataset_are_written_with_the_new_names(
    dataset: Path, old: Path, tmp_path: Path
) -> None:
    for name, source in (("old", old), ("new", dataset)):
        add_token_weights(source, tmp_path / name, lambda sequence: sequence["tokens"] % 2)
    assert load_manifest(tmp_path / "old") == load_manifest(tmp_path / "new")
    assert content(tmp_path / "old") == content(tmp_path / "new")
    (shard, *_) = shards_of(tmp_path / "old", load_manifest(tmp_path / "old"), "validation", "code")
    assert "token_weights" in next(read_sequences(shard))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (FORMAT_VERSION + 1, "reads 2 and 3: update nextpt, or prepare the data again"),
        (1, "reads 2 and 3: prepare the data again"),
        (None, "reads 2 and 3: prepare the data again"),
    ],
)
def test_other_versions_are_refused(
    dataset: Path, tmp_path: Path, version: int | None, message: str
) -> None:
    manifest = json.loads((dataset / "dataset.json").read_text()) | {"format_version": version}
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(DataPrepError, match=f"has format version {version}; .*{message}"):
        DatasetManifest.load(tmp_path)


def test_an_old_preparation_is_continued_and_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_units():
        expected = prepare(world(tmp_path / "whole"))
        spec = world(tmp_path / "continued")
        with monkeypatch.context() as patch:

            def fail(*arguments: object) -> None:
                raise DataPrepError("interrupted")

            patch.setattr(stages, "finish", fail)
            with pytest.raises(DataPrepError, match="interrupted"):
                prepare(spec)
        work_of_version_2(spec.work)
        assert prepare(spec).fingerprint == expected.fingerprint
    whole = content(tmp_path / "whole" / "out") | {"dataset.json": ""}
    assert content(spec.output) | {"dataset.json": ""} == whole
    dataset_of_version_2(spec.output)
    assert is_current(spec)
