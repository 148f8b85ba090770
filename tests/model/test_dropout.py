"""Dropout: its share, its scale, its independence, and that layout and memory change no mask."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nextpt.model import ComputeOptions, Decoder
from nextpt.model.dropout import _mix, dropout, mask_keys, mixed, place_keys
from tests.support.models import decoder as decoder_of_config

ROWS, LENGTH, WIDTH = 8, 64, 96
POSITIONS = torch.arange(LENGTH).expand(ROWS, -1)


def kept(keys_BT: Tensor, rate: float) -> Tensor:
    return dropout(torch.ones(*keys_BT.shape, WIDTH), keys_BT, rate) != 0


def keys(seed: int = 0, first: int = 0, place: int = 2) -> Tensor:
    return place_keys(mask_keys(seed, torch.arange(first, first + ROWS), LENGTH), place)


@given(st.integers(-(2**31), 2**31 - 1))
def test_integers_and_tensors_are_mixed_alike(value: int) -> None:
    assert mixed(value) == int(_mix(torch.tensor([value], dtype=torch.int32)))


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_a_share_is_dropped_and_the_mean_is_kept(rate: float) -> None:
    x = torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    out = dropout(x, keys(), rate)
    mask = kept(keys(), rate)
    assert torch.equal(out, torch.where(mask, x * (1 / (1 - rate)), 0.0))
    deviation = math.sqrt(rate * (1 - rate) / mask.numel())
    assert abs((~mask).double().mean().item() - rate) < 5 * deviation
    for axis in (0, 1, 2):  # every row, token and channel has its share
        others = mask.numel() / mask.shape[axis]
        shares = (~mask).double().mean(dim=[d for d in range(3) if d != axis])
        assert (shares - rate).abs().max() < 6 * math.sqrt(rate * (1 - rate) / others)


OTHERS: dict[str, dict[str, int]] = {
    "sequence": {"first": ROWS},
    "far sequence": {"first": 2**33},
    "seed": {"seed": 1},
    "place": {"place": 3},
}


@pytest.mark.parametrize("other", OTHERS)
def test_masks_are_independent(other: str) -> None:
    first, second = kept(keys(), 0.5), kept(keys(**OTHERS[other]), 0.5)
    agreement = (first == second).double().mean().item()
    assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(first.numel())


def test_neighbours_are_independent() -> None:
    mask = kept(keys(), 0.5)
    for shifted, whole in (
        (mask[:, 1:], mask[:, :-1]),
        (mask[..., 1:], mask[..., :-1]),
        (mask[1:], mask[:-1]),
    ):
        agreement = (shifted == whole).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(whole.numel())


def model(**changes: Any) -> Decoder:
    spec = decoder_of_config()[1].spec
    return Decoder(
        replace(spec, max_position=LENGTH), options=ComputeOptions(dropout=0.25, **changes)
    )


def tokens(of: Decoder) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(of.vocab_size, (ROWS, LENGTH), generator=generator)


def test_evaluation_drops_nothing_and_needs_no_numbers() -> None:
    decoder = model()
    without = Decoder(decoder.spec)
    ids = tokens(decoder)
    expected = without(ids, POSITIONS).hidden
    assert torch.equal(decoder.eval()(ids, POSITIONS).hidden, expected)
    numbers = torch.arange(ROWS)
    trained = decoder.train()(ids, POSITIONS, sequence_numbers_B=numbers).hidden
    assert not torch.allclose(trained, expected, atol=1e-2)
    with pytest.raises(ValueError, match="sequence_numbers_B"):
        decoder(ids, POSITIONS)


def test_rows_are_dropped_alike_in_any_batch() -> None:
    decoder = model()
    ids, numbers = tokens(decoder), torch.arange(100, 100 + ROWS)
    whole = decoder(ids, POSITIONS, sequence_numbers_B=numbers).hidden
    for rows in (slice(0, 3), slice(3, ROWS)):
        part = decoder(ids[rows], POSITIONS[rows], sequence_numbers_B=numbers[rows]).hidden
        torch.testing.assert_close(part, whole[rows])


def test_recomputed_activations_have_the_same_masks() -> None:
    gradients = []
    for checkpointing in (False, True):
        decoder = model(activation_checkpointing=checkpointing)
        numbers = torch.arange(ROWS)
        decoder(
            tokens(decoder), POSITIONS, sequence_numbers_B=numbers
        ).hidden.square().sum().backward()
        gradients.append([p.grad for p in decoder.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
