"""Causal attention in Triton, forward and backward, and its self-test on a GPU."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kernels.attention.call import AttentionCall, AttentionOutput
from kernels.attention.comparison import difference


def run(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    """Compute `kernels.attention.attention`."""
    from kernels.attention import ops  # registers operators, and needs triton

    intervals, scale = call.intervals(q.device), call.scale
    if scale <= 0:  # kernels take the largest score before they scale it
        q, scale = (-q, -scale) if scale < 0 else (0 * q, 1.0)
    out, lse, *_ = ops.attention(q, k, v, call.sinks, *intervals, scale, call.softcap or 0.0)
    return AttentionOutput(out, lse)


def _current_gpu() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


_failures: dict[int, str | None] = {}  # by CUDA device, for the life of the process


def failure_on_gpu() -> str | None:
    """Return why the kernels must not be used on this GPU; None where they may, or without one.

    They are compared with the reference once: a compiler that errs must train no model.
    """
    device = _current_gpu()
    if device is None:
        return None
    if device not in _failures:
        _failures[device] = reason = difference(run, "cuda")
        if reason:
            warnings.warn(
                f"our Triton attention is not used on {torch.cuda.get_device_name()}: {reason}",
                stacklevel=2,
            )
    return _failures[device]


# torch.compile asks instead of tracing the comparison. That is all that the decorator
# torch.compiler.assume_constant_result does, beside importing the compiler, for a second.
failure_on_gpu.__dict__["_dynamo_marked_constant"] = True
