"""The optional column of token weights, from the shard to the loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.files import canonical_json, sha256_file
from data_prep.format import columns
from data_prep.streaming_compat import import_streaming
from nextpt.data.loader import Loader
from nextpt.data.rows import DomainRows, load_manifest
from tests.support.datasets import tiny


@pytest.fixture(scope="module")
def weighted(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset with weights: 2 for tokens of even id, 0.5 for odd ones."""
    import_streaming()
    from streaming import MDSWriter

    folder = tmp_path_factory.mktemp("weighted") / "shards"
    shutil.copytree(dataset, folder)
    manifest = load_manifest(folder)
    layout = columns(manifest.sequence_length, manifest.vocab_size)
    layout["token_weights"] = f"ndarray:float32:{manifest.sequence_length + 1}"
    raw = json.loads((folder / "dataset.json").read_text())
    for index, domain in enumerate(manifest.domains):
        rows = DomainRows(dataset, manifest, "train", domain)
        shutil.rmtree(folder / "train" / domain)
        writer = MDSWriter(columns=layout, out=str(folder / "train" / domain), hashes=["xxh64"])
        for row in (rows[i] for i in range(len(rows))):
            weights = np.where(row.tokens % 2, 0.5, 2.0).astype(np.float32)
            writer.write({"tokens": row.tokens, "doc_lens": row.doc_lens, "doc_flags": row.doc_flags,
                          "domain": np.uint16(index), "text_bytes": np.uint32(0), "token_weights": weights})
        writer.finish()
        raw["splits"]["train"][domain]["index_sha256"] = sha256_file(folder / "train" / domain / "index.json")
    (folder / "dataset.json").write_text(canonical_json(raw))
    return folder


@pytest.mark.parametrize("used", [True, False])
def test_weights_of_the_shards_reach_the_batch_where_asked_for(weighted: Path, used: bool) -> None:
    config = tiny(weighted, Path("unused"), objective={"token_weights": used, "domain_weights": {"code": 3.0}})
    loader = Loader(config, 0, 1)
    for batch in loader.step_batches(0):
        factor = np.where(batch.domain_ids[:, None] == loader.domains.index("code"), 3.0, 1.0)
        own = np.where(batch.targets % 2 == 0, 2.0, 0.5) if used else 1.0
        expected = np.where(batch.targets >= 0, factor * own, 0.0)
        np.testing.assert_allclose(batch.token_weights.numpy(), expected)
    loader.close()
