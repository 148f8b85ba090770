"""Random states of one rank as JSON values: Python's, torch's and the device's generators."""

from __future__ import annotations

import base64
import random
from typing import Any

import torch


def get_rng_state() -> dict[str, Any]:
    """States of Python's and torch's generators and, on a GPU, the device's."""
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _encode(torch.cuda.get_rng_state())
    return states


def set_rng_state(states: dict[str, Any]) -> None:
    """Restore what `get_rng_state` returned.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: When it is not such a state.
    """
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_decode(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(states["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
