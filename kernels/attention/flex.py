"""torch's FlexAttention: kernels that torch compiles for the intervals of keys that queries see.

No mask of S x S exists: it takes `kernels.attention.block_mask`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.attention.call import AttentionCall, AttentionOutput


def run(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionOutput:
    """Compute `kernels.attention.attention`.

    On a CPU torch has the forward pass only, as plain operations and not as a kernel.
    """
    from torch.nn.attention.flex_attention import AuxRequest  # imports torch's compiler

    out, auxiliary = _function(q.device.type)(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=None if call.softcap is None else _softcap(call.softcap),
        block_mask=call.block_mask(q.device),
        scale=call.scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_aux=AuxRequest(lse=True),
    )
    lse = auxiliary.lse
    if call.sinks is not None:
        # A sink adds exp(sink) to the denominator: the share of all others is sigmoid(lse - sink)
        sinks = call.sinks.float().view(1, -1, 1)
        out = out * torch.sigmoid(lse - sinks).unsqueeze(-1).to(out.dtype)
        lse = torch.logaddexp(lse, sinks)
    return AttentionOutput(out.transpose(1, 2), lse)


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # One kernel for each shape: lengths of a run do not change, and dynamic ones are slower
    return torch.compile(flex_attention, dynamic=False)


def _function(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if device == "cpu" or torch.compiler.is_compiling():
        plain: Callable[..., Any] = flex_attention
        return plain
    return _compiled()


@functools.lru_cache(maxsize=8)  # a function of its own would be compiled anew in each call
def _softcap(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod
