"""The global order is a pure function of its inputs; batches say what the rows say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.format import PADDING
from nextpt.data.batch import IGNORE_INDEX, Row, collate
from nextpt.data.loader import Loader
from nextpt.data.order import BLOCK, Order
from tests.support.datasets import tiny


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-5, 1.0), min_size=1, max_size=6), st.integers(1, 40))
def test_shares_are_kept_and_places_add_up(shares: list[float], blocks: int) -> None:
    order = Order([10] * len(shares), shares, 3)
    given_rows = order.given(blocks)
    assert int(given_rows.sum()) == blocks * BLOCK
    assert (given_rows >= order.given(blocks - 1)).all()
    exact = np.array(shares) / sum(shares) * blocks * BLOCK
    assert np.abs(given_rows - exact).max() <= 4 * np.log2(blocks + 2)


def test_every_row_comes_once_before_any_comes_twice() -> None:
    order = Order([300, 50, 7], [0.5, 0.3, 0.2], 1)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for position in range(2 * BLOCK):
        domain, row = order[position]
        seen[domain].append(row)
    for domain, size in enumerate((300, 50, 7)):
        rows = seen[domain]
        for start in range(0, len(rows) - size, size):
            assert sorted(rows[start : start + size]) == list(range(size))
        assert rows[:size] != rows[size : 2 * size]  # each pass has its own order


def test_order_depends_on_the_seed_and_nothing_else() -> None:
    a, b, other = (Order([100, 20], [0.9, 0.1], seed) for seed in (1, 1, 2))
    places = [5000, 3, 4095, 4096]
    assert [a[p] for p in places] == [b[p] for p in reversed(places)][::-1]
    assert [a[p] for p in range(50)] != [other[p] for p in range(50)]
    assert a.fingerprint("x") == b.fingerprint("x") != other.fingerprint("x") and a.fingerprint("x") != a.fingerprint("y")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_micro_batches_only_slice_the_order(dataset: Path, world: int) -> None:
    found: list[int] = []
    for micro in (1, 2):
        config = tiny(dataset, Path("unused"), train={"micro_batch_size": micro})
        positions = [p for rank in range(world) for r in Loader(config, rank, world).positions(3) for p in r]
        assert sorted(positions) == list(range(24, 32))
        found += positions
    assert Counter(found) == Counter({p: 2 for p in range(24, 32)})


def test_a_batch_says_what_its_row_says() -> None:
    tokens = np.array([9, 1, 2, 9, 9, 3, 4, 0, 0])
    row = Row(tokens, np.array([4, 3, 2]), np.array([0, 2, PADDING]), 1, np.arange(9, dtype=np.float32))
    sizes = np.array([0, 1, 2, 3, 4, 0, 0, 0, 0, 0])
    batch = collate([row], sizes, np.array([1.0, 2.0], dtype=np.float32))
    x = IGNORE_INDEX
    assert batch.tokens.tolist() == [[9, 1, 2, 9, 9, 3, 4, 0]]
    assert batch.targets.tolist() == [[1, 2, 9, x, 3, 4, x, x]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.target_bytes.tolist() == [[1, 2, 0, 0, 3, 4, 0, 0]]
    assert batch.token_weights.tolist() == [[2.0, 4.0, 6.0, 0.0, 10.0, 12.0, 0.0, 0.0]]
    assert batch.domain_ids.tolist() == [1] and batch.document_ids.dtype == torch.int32


def test_one_pass_sees_every_byte_once(dataset: Path) -> None:
    config = tiny(dataset, Path("unused"), train={"global_batch_size": 1, "micro_batch_size": 1})
    loader = Loader(config, 0, 1)
    counts = loader.manifest.splits["heldout"]
    for domain, name in enumerate(loader.domains):
        batches = list(loader.validation_batches(domain, 10**9))
        assert sum(int(b.target_bytes.sum()) for b in batches) == counts[name].bytes
    loader.close()


def test_ranks_share_validation_rows_without_counting_any_twice(dataset: Path) -> None:
    config = tiny(dataset, Path("unused"), train={"global_batch_size": 12, "micro_batch_size": 2})
    whole = sum(int(b.target_bytes.sum()) for b in Loader(config, 0, 1).validation_batches(0, 7))
    parts = [list(Loader(config, rank, 3).validation_batches(0, 7)) for rank in range(3)]
    assert len({len(p) for p in parts}) == 1
    assert sum(int(b.target_bytes.sum()) for p in parts for b in p) == whole
