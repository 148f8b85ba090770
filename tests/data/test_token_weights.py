"""The optional column of token weights, from the shard to the loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nextpt.data.loader import Loader
from nextpt.errors import DataError
from tests.support.datasets import tiny
from tests.support.layouts import rewrite


@pytest.fixture(scope="module")
def weighted(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset with weights: 2 for tokens of even id, 0.5 for odd ones."""
    return rewrite(dataset, tmp_path_factory.mktemp("weighted") / "shards", extra={"token_weights": "ndarray:float32:65"},
                   change=lambda s: s | {"token_weights": np.where(s["tokens"] % 2, 0.5, 2.0).astype(np.float32)})


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


def test_weights_that_are_not_there_are_refused_but_places_past_the_last_row_need_none(dataset: Path, weighted: Path) -> None:
    train = {"global_batch_size": 12, "micro_batch_size": 4}
    with pytest.raises(DataError, match="no token_weights column"):
        Loader(tiny(dataset, Path("unused"), objective={"token_weights": True}), 0, 1).step_batches(0)
    loader = Loader(tiny(weighted, Path("unused"), objective={"token_weights": True}, train=train), 2, 3)
    (batch,) = loader.validation_batches(0, 3)  # all three rows are rank 0's
    assert float(batch.token_weights.sum()) == 0 and (batch.targets < 0).all()
