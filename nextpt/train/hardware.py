"""Peak FLOP/s of known devices, and memory in use."""

from __future__ import annotations

import psutil
import torch

from nextpt.config import Config

# Dense bf16 peak in TFLOP/s, from the vendor's data sheets; without sparsity. Longest name first
# where one holds another.
PEAK_BF16_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
}


def peak_flops(config: Config, device: torch.device) -> float | None:
    """Peak FLOP/s of one device, None where it is unknown; utilisation is not reported then."""
    if config.train.peak_tflops:
        return config.train.peak_tflops * 1e12
    if device.type != "cuda" or config.train.precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for key, peak in PEAK_BF16_TFLOPS.items() if key in name), None)


def memory_in_use(device: torch.device) -> int:
    """Bytes: peak of the allocator on a GPU, resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
