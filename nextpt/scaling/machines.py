"""Devices that runs are planned for: memory, peak FLOP/s and links, from data sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nextpt.base.errors import ConfigError
from nextpt.train.hardware import PEAK_BF16_TFLOPS


@dataclass(frozen=True)
class Machine:
    """One kind of device and its links.

    Attributes:
        name: Name for messages.
        memory: Bytes.
        peak: Dense bf16 FLOP/s.
        link: Bytes/s that one device sends to others of its node, one direction.
        node_network: Bytes/s that one node sends to others, all its adapters together.
        node_size: Devices per node.
    """

    name: str
    memory: int
    peak: float
    link: float
    node_network: float = 400e9  # eight adapters of 400 Gbit/s, as in HGX H100 nodes
    node_size: int = 8

    def bus(self, devices: int) -> float:
        """Return bytes/s per device of a ring over `devices` devices.

        It is the slower of the links and of the nodes' networks.

        A ring crosses each node boundary once, over all adapters of a node together (NCCL lays one
        ring per adapter).
        """
        return self.link if devices <= self.node_size else min(self.link, self.node_network)

    def direct(self, devices: int) -> float:
        """Return bytes/s per device where every device sends to every other (all-to-all).

        Between nodes the devices of a node share its network.
        """
        if devices <= self.node_size:
            return self.link
        return min(self.link, self.node_network / self.node_size)


def _gpu(name: str, gib: float, link: float) -> Machine:
    return Machine(name, int(gib * 2**30), PEAK_BF16_TFLOPS[name] * 1e12, link)


# Memory as the driver shows it, rounded down; NVLink per direction is half of the advertised sum;
# L40S and A10 have PCIe 4.
MACHINES = {
    "a10": _gpu("A10", 22, 32e9),
    "l40s": _gpu("L40S", 44, 32e9),
    "a100": _gpu("A100", 79, 300e9),
    "a100-40": replace(_gpu("A100", 39, 300e9), name="A100 40 GB"),
    "h100": _gpu("H100", 79, 450e9),
    "h200": _gpu("H200", 139, 450e9),
    "b200": _gpu("B200", 178, 900e9),
}


def machine(
    name: str,
    *,
    memory_gib: float | None = None,
    peak_tflops: float | None = None,
    link_gbs: float | None = None,
    node_gbs: float | None = None,
    node_size: int | None = None,
) -> Machine:
    """Return a device by name, with the given quantities in the place of its own.

    Raises:
        ConfigError: The name is unknown.
    """
    if name.lower() not in MACHINES:
        raise ConfigError(
            f"--device {name}: known are {', '.join(MACHINES)}; for another, name the nearest and"
            " give --memory, --peak and --link"
        )
    changes: dict[str, Any] = {
        "memory": memory_gib and int(memory_gib * 2**30),
        "peak": peak_tflops and peak_tflops * 1e12,
        "link": link_gbs and link_gbs * 1e9,
        "node_network": node_gbs and node_gbs * 1e9,
        "node_size": node_size,
    }
    return replace(
        MACHINES[name.lower()], **{key: value for key, value in changes.items() if value}
    )
