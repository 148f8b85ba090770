"""Imports the heavy libraries, one after the other, and prints what they say as JSON.

Run as a child process (`python -m launcher.doctor.probe`): an import that crashes or hangs must not
take the doctor along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any


def torch_facts() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    devices = []
    for index in range(torch.cuda.device_count() if cuda else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "memory": properties.total_memory,
                "capability": [properties.major, properties.minor],
            }
        )
    return {
        "cuda_build": torch.version.cuda,
        "hip_build": torch.version.hip,
        "cuda": cuda,
        "devices": devices,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "gloo": torch.distributed.is_gloo_available(),
    }


def deepspeed_facts() -> dict[str, Any]:
    from nextpt.train import engine  # the one room that imports deepspeed, with its settings

    ops = engine.deepspeed.ops
    return {
        "compatible": sorted(name for name, fits in ops.__compatible_ops__.items() if fits),
        "prebuilt": sorted(
            name for name, built in engine.deepspeed.git_version_info.installed_ops.items() if built
        ),
    }


def streaming_facts() -> dict[str, Any]:
    from data_prep.streaming_compat import import_streaming

    import_streaming()
    return {}


def triton_facts() -> dict[str, Any]:
    import triton

    return {"version": triton.__version__}


def kernels_facts() -> dict[str, Any]:
    import kernels
    import kernels.causality

    return {
        "path": os.path.dirname(os.path.abspath(kernels.__file__)),
        "works": bool(kernels.causality.__doc__),
    }


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_facts,
    "triton": triton_facts,
    "kernels": kernels_facts,
    "streaming": streaming_facts,
    "deepspeed": deepspeed_facts,
}


def main() -> None:
    """One line of JSON per library, so that what came before a crash is known."""
    for name, facts in PROBES.items():
        try:
            found = facts()
        except Exception as error:
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps({"library": name} | found), flush=True)


if __name__ == "__main__":
    main()
