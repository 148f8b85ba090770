"""Choosing an implementation by name or by device, from what each declares."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Implementation:
    """One way to compute something.

    features: what it can do beyond the plain case. devices: torch device types it runs on.
    available: why it cannot be used in this process, or None.
    """

    name: str
    run: Callable[..., Any]
    devices: frozenset[str]
    features: frozenset[str] = field(default_factory=frozenset)
    available: Callable[[], str | None] = lambda: None

    def lacks(self, device: str, features: Iterable[str]) -> list[str]:
        """What stands in the way of using it, as phrases; empty when nothing does."""
        reason = self.available()
        found = [reason] if reason else []
        if device not in self.devices:
            found.append(f"it does not run on {device}")
        return found + [
            f"it has no {feature}" for feature in sorted(features) if feature not in self.features
        ]


class TritonImplementation(Implementation):
    """One that also runs on a CPU where Triton interprets its kernels (TRITON_INTERPRET=1)."""

    def lacks(self, device: str, features: Iterable[str]) -> list[str]:
        if device == "cpu" and self.available() is None and _interpreted():
            device = next(iter(self.devices))
        return super().lacks(device, features)


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def choose(
    table: dict[str, Implementation],
    order: Iterable[str],
    name: str,
    device: str,
    features: Iterable[str],
) -> Implementation:
    """The named implementation, or for "auto" the first in `order` that can do what is asked.

    Raises ValueError that says what the named one lacks, or lists the names there are.
    """
    features = set(features)
    if name == "auto":
        for candidate in order:
            if not table[candidate].lacks(device, features):
                return table[candidate]
        raise ValueError(f"no implementation on {device} has all of: {', '.join(sorted(features))}")
    if name not in table:
        raise ValueError(
            f"unknown implementation {name!r}; there are auto, {', '.join(sorted(table))}"
        )
    if lacking := table[name].lacks(device, features):
        raise ValueError(f"implementation {name!r} cannot be used here: {'; '.join(lacking)}")
    return table[name]
