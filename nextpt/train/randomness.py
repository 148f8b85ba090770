"""Random states of one rank, as JSON values."""

from __future__ import annotations

import base64
import random
from typing import Any

import torch


def get_rng() -> dict[str, Any]:
    """States of Python's, torch's and, on a GPU, the device's generators."""
    version, internal, gauss = random.getstate()
    states = {"python": [version, list(internal), gauss], "torch": _text(torch.get_rng_state())}
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    return states


def set_rng(states: dict[str, Any]) -> None:
    """Put back what `get_rng` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_tensor(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(states["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
