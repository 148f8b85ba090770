"""Global order: a pure function of its inputs, in integers, with random access."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextpt.data.domain_order import WINDOW, DomainOrder
from nextpt.data.mixture import BLOCK, PERIOD, UNIT, Mixture, quantise_shares
from nextpt.data.order import GlobalOrder
from nextpt.data.permutation import permutation
from nextpt.data.plan import DataPlan, Stage

PINNED_DRAW = [3, 4, 2, 0, 5, 1, 7, 6]
PINNED_ORDER = "f5a4d99ba5c0978c147f157f264a0bceb519ea55679b1cd4a04cb8ac1c4c05f2"
SHARES = st.lists(st.floats(0, 1.0), min_size=1, max_size=8).filter(any)


def plan(*stages: tuple[int, list[float]], seed: int = 3) -> DataPlan:
    return DataPlan(
        seed, tuple(Stage(start, quantise_shares(shares), 64) for start, shares in stages)
    )


@pytest.mark.thorough
@settings(max_examples=60, deadline=None)
@given(SHARES)
def test_quantised_shares_sum_to_the_unit(shares: list[float]) -> None:
    weights = quantise_shares(shares)
    assert sum(weights) == UNIT
    total = sum(map(Fraction, shares))
    for weight, share in zip(weights, shares, strict=True):
        assert (weight > 0) == (share > 0)
        assert abs(weight - Fraction(share) * UNIT / total) < 1 + len(shares)


@settings(max_examples=40, deadline=None)
@given(SHARES, st.integers(0, 10**9))
def test_counts_of_any_number_of_blocks_are_exact(shares: list[float], block: int) -> None:
    weights = quantise_shares(shares)
    mixture = Mixture(weights)
    for b in (block, block + 1, block + PERIOD):
        amounts = mixture.counts(b)
        assert amounts.min() >= 0 and int(amounts.sum()) == BLOCK
        assert (mixture.counts_before(b) + amounts == mixture.counts_before(b + 1)).all()
    # No drift, also after 10^12 samples
    assert (mixture.counts_before(block + PERIOD) - mixture.counts_before(block) == weights).all()
    for weight, drawn in zip(weights, mixture.counts_before(block), strict=True):
        assert abs(int(drawn) - Fraction(weight * block, PERIOD)) <= np.log2(PERIOD)
    assert (mixture.counts_before(0) == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=70).filter(any), st.integers(0, 2**31 - 1))
def test_an_epoch_is_a_permutation_that_touches_few_shards_at_a_time(
    samples: list[int], seed: int
) -> None:
    order, total = DomainOrder(np.array(samples), seed, 1), sum(samples)
    shard_of = np.repeat(np.arange(len(samples)), samples)
    for number in (0, 1, 10**9):
        sequences = order.sequences(np.arange(number * total, (number + 1) * total))
        assert sorted(sequences) == list(range(total))
        at, window_shards = 0, []
        while at < total:
            shards, end = order.shards_ahead(number * total + at, 1)
            size = sum(samples[s] for s in shards)
            assert end == number * total + at + size
            assert len(shards) <= WINDOW and set(shard_of[sequences[at : at + size]]) == set(shards)
            window_shards += shards
            at += size
        assert sorted(window_shards) == [s for s, n in enumerate(samples) if n]


def test_epochs_and_windows_differ_and_mix_their_shards() -> None:
    order = DomainOrder(np.full(40, 50), 1, 1)
    first, second = order.sequences(np.arange(2000)), order.sequences(np.arange(2000, 4000))
    assert (first != second).mean() > 0.9
    assert len(set(first[: WINDOW * 5] // 50)) > WINDOW // 2  # not one shard after another
    assert (
        first[:800] != DomainOrder(np.full(40, 50), 2, 1).sequences(np.arange(800))
    ).mean() > 0.9
    ahead, end = order.shards_ahead(1990, 2)
    assert (
        end == 2000
        and set(ahead[:8]) == set(first[1600:] // 50)
        and set(ahead[8:]) == set(second[:800] // 50)
    )
    draws = np.array([3, 790, 801, 1999, 2000, 3999])  # a rank's share has gaps
    assert (order.sequences(draws) == np.concatenate((first, second))[draws]).all()


def test_every_sequence_comes_once_before_any_comes_twice_also_over_stages() -> None:
    sizes = (300, 50, 7)
    order = GlobalOrder(
        plan((0, [0.5, 0.3, 0.2]), (3000, [0.1, 0.1, 0.8]), (5001, [0, 1, 0]), seed=1),
        [np.full(30, 10), np.full(10, 5), np.array([7])],
    )
    domains, sequences = order.locate(0, 9000)
    for domain, size in enumerate(sizes):
        of_domain = sequences[domains == domain]
        for start in range(0, len(of_domain) - size, size):
            assert sorted(of_domain[start : start + size]) == list(range(size))
    for position in (0, 1, 2999, 3000, 4096, 5001, 9000):
        assert (
            order.domain_counts(position) == np.bincount(domains[:position], minlength=3).tolist()
        )
    assert set(domains[5001:]) == {1} and abs((domains[3000:5001] == 2).mean() - 0.8) < 0.05


def test_order_depends_on_the_seed_and_the_position_and_nothing_else() -> None:
    shards = [np.full(20, 5), np.full(4, 5)]
    a, b, other = (
        GlobalOrder(plan((0, [0.9, 0.1]), (5000, [0.5, 0.5]), seed=seed), shards)
        for seed in (1, 1, 2)
    )
    positions = [9000, 5000, 3, 4095, 4096, 4999]
    assert [a[p] for p in positions] == [b[p] for p in reversed(positions)][::-1]
    domains, sequences = a.locate(4990, 5100)
    assert list(zip(domains.tolist(), sequences.tolist(), strict=True)) == [
        b[p] for p in range(4990, 5100)
    ]
    assert [a[p] for p in range(50)] != [other[p] for p in range(50)]


def test_the_order_equals_the_pinned_order_of_this_version() -> None:
    """If this fails, the order has changed: raise ORDER_VERSION, so that older runs refuse it."""
    assert permutation(8, 1, 2, (3, 4, 5)).tolist() == PINNED_DRAW
    order = GlobalOrder(
        plan((0, [0.7, 0.2, 0.1]), (10000, [0.2, 0.2, 0.6]), seed=7),
        [np.arange(1, 60), np.full(33, 8), np.array([3])],
    )
    located = np.stack(order.locate(5000, 20000)).astype("<i8").tobytes()
    assert hashlib.sha256(located).hexdigest() == PINNED_ORDER


@pytest.mark.process
def test_position_1e9_is_reached_at_once() -> None:
    """In 200 MB beyond the imports, with 10^5 shards and 1.6 10^9 sequences per domain.

    The time is in bench/loader.py.
    """
    script = """
import resource, numpy as np
from nextpt.data.mixture import quantise_shares
from nextpt.data.order import GlobalOrder
from nextpt.data.plan import DataPlan, Stage
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
plan = DataPlan(0, (Stage(0, quantise_shares([3, 1]), 64),))
order = GlobalOrder(plan, [np.full(100_000, 16_384)] * 2)
order.locate(10**9, 10**9 + 4096)
print(peak() - before)
"""
    completed = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert 0 <= int(completed.stdout) < 200e6


@pytest.mark.parametrize("position", [10**12, 2**53 + 1])
def test_far_positions_are_exact(position: int) -> None:
    order = GlobalOrder(plan((0, [0.6, 0.4])), [np.full(7, 5), np.full(3, 2)])
    counts = order.domain_counts(position)
    assert sum(counts) == position
    domain, _ = order[position]
    assert order.domain_counts(position + 1)[domain] == counts[domain] + 1
