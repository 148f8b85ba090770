"""Import probe: imports the heavy libraries one by one and prints facts about each as JSON.

It runs as a child process (`python -m launcher.doctor.probe`): an import that crashes or hangs does
not end the doctor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any


def torch_facts() -> dict[str, Any]:
    """Return build and devices of torch."""
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
        "nccl": _nccl_version() if cuda else None,
        "gloo": torch.distributed.is_gloo_available(),
    }


def _nccl_version() -> str:
    import torch

    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]  # untyped
    return ".".join(map(str, version))


def deepspeed_facts() -> dict[str, Any]:
    """Return the compiled ops of DeepSpeed."""
    from nextpt.train.deepspeed_api import op_names  # sets the environment that deepspeed needs

    compatible, prebuilt = op_names()
    return {"compatible": compatible, "prebuilt": prebuilt}


def streaming_facts() -> dict[str, Any]:
    """Import mosaicml-streaming."""
    from data_prep.streaming_compat import import_streaming

    import_streaming()
    return {}


def triton_facts() -> dict[str, Any]:
    """Return the version of Triton."""
    import triton

    return {"version": triton.__version__}


def kernels_facts() -> dict[str, Any]:
    """Return which package `kernels` is imported."""
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
    """Print one line of JSON per library, so that the libraries before a crash are known."""
    for name, facts in PROBES.items():
        try:
            result = facts()
        except Exception as error:
            result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps({"library": name} | result), flush=True)


if __name__ == "__main__":
    main()
