"""Following torch.autocast, for operators that take matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors in the dtype that autocast wants for matrix products, where it is on.

    As in torch, fp64 stays.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [
        t if t is None or t.dtype == torch.float64 else t.to(torch.get_autocast_dtype(device))
        for t in tensors
    ]
