"""Dropout whose masks are a function of what is dropped, and of nothing else.

The mask of an element follows from the run's seed, the number of its sequence in the order of the
run, its position, its place in the model and its channel, by an integer hash. So a run drops the
same elements on any number of ranks, with any micro-batch, after a resume, and when activations are
recomputed; there is no state, and a sequence that is read again has another mask.

The hash is lowbias32 (github.com/skeeto/hash-prospector), a bijection of 32 bits in which a changed
bit of the input changes each bit of the output with a probability of nearly 1/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_LOW = 0xFFFFFFFF
_CHANNELS = 0x5BD1E995  # keeps the channels' keys apart from those of positions


def mask_keys(seed: int, sequence_numbers_B: Tensor, length: int) -> Tensor:
    """Keys of the tokens of a batch, int32 [B, T].

    Args:
        seed: Of the run.
        sequence_numbers_B: Number of each sequence in the order of the run, int64 [B].
        length: Tokens of a sequence, T.
    """
    low_B = sequence_numbers_B.to(torch.int32)
    high_B = (sequence_numbers_B >> 32).to(torch.int32)
    keys_B = _mix(_mix(low_B ^ mixed(seed)) ^ high_B)
    positions_T = torch.arange(length, dtype=torch.int32, device=sequence_numbers_B.device)
    return _mix(keys_B[:, None] ^ _mix(positions_T))


def place_keys(keys_BT: Tensor, place: int) -> Tensor:
    """Keys of the tokens at one place of the model, int32 [B, T]."""
    return _mix(keys_BT ^ mixed(place))


def dropout(x_BTD: Tensor, keys_BT: Tensor, rate: float) -> Tensor:
    """Set a share of the elements to 0, and divide the others by 1 - rate.

    Args:
        x_BTD: Activations.
        keys_BT: Keys of the tokens at this place.
        rate: Share that is dropped, in [0, 1).
    """
    channels = torch.arange(x_BTD.shape[-1], dtype=torch.int32, device=x_BTD.device)
    hashed_BTD = _mix(keys_BT.unsqueeze(-1) ^ _mix(channels ^ _CHANNELS))
    kept_BTD = (hashed_BTD & 0x7FFFFFFF) >= round(rate * 2**31)
    return torch.where(kept_BTD, x_BTD * (1.0 / (1.0 - rate)), 0.0)


def mixed(value: int) -> int:
    """`_mix` of an integer, of which the lowest 32 bits count; signed, of 32 bits."""
    value &= _LOW
    value = (value ^ value >> 16) * _FIRST & _LOW
    value = (value ^ value >> 15) * _SECOND & _LOW
    return _signed(value ^ value >> 16)


def _mix(values: Tensor) -> Tensor:
    """lowbias32 of int32, whose products wrap."""
    values = (values ^ _shift(values, 16)) * _FIRST
    values = (values ^ _shift(values, 15)) * _signed(_SECOND)
    return values ^ _shift(values, 16)


def _shift(values: Tensor, bits: int) -> Tensor:
    """Shift right without the sign."""
    return (values >> bits) & ((1 << (32 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value
