"""Cross-entropy in chunks of tokens, with the gradients computed in the forward pass.

Per chunk: logits = x W^T; they are turned in place into their own gradient g = s (1 + 2 z lse) softmax - s onehot;
then dX = g W and dW += g^T x. Three matrix products, 6 N D V FLOPs, and the logits of one chunk at a time. The
backward pass only multiplies by the gradient that comes from above.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.choice import Implementation

# Bytes of logits that exist at once. Fixed, not read from free memory: the number of chunks changes the last bits.
WORKSPACE_BYTES = {"cpu": 2**26, "cuda": 2**31}
# Fewer rows make the matrix products too thin.
MIN_ROWS = 128


def rows_per_chunk(tokens: int, vocabulary: int, device: str) -> int:
    """Rows of fp32 logits that fit the workspace, spread evenly so that the last chunk is not a sliver."""
    most = max(WORKSPACE_BYTES.get(device, 2**28) // (4 * vocabulary), MIN_ROWS)
    chunks = max(-(-tokens // most), 1)
    return max(-(-tokens // chunks), 1)


def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, valid: Tensor, scale: Tensor,
        z_loss: float, softcap: float | None, chunk_tokens: int | None) -> tuple[Tensor, ...]:
    """scale [N]: token weight / normalizer, 0 where not `valid`. Returns the fields of LossOutput."""
    rows = chunk_tokens or rows_per_chunk(hidden.shape[0], weight.shape[0], hidden.device.type)
    return _ChunkedLoss.apply(hidden, weight, bias, targets, valid, scale, z_loss, softcap, rows)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, valid, scale, z_loss, softcap, rows):  # noqa: ANN001, ANN205
        needs = ctx.needs_input_grad[:3]
        wide = scale.dtype
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs[1] else None
        d_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if bias is not None and needs[2] else None
        count = hidden.shape[0]
        nats, lse = (torch.empty(count, dtype=wide, device=hidden.device) for _ in range(2))
        hits = torch.empty(count, dtype=torch.bool, device=hidden.device)
        for first in range(0, count, rows):
            part = slice(first, min(first + rows, count))
            logits = _logits(hidden[part], weight, bias, softcap, wide)
            hits[part], lse[part], nats[part] = _statistics(logits, targets[part], valid[part])
            if not any(needs):
                continue
            g = _gradient(logits, targets[part], scale[part], lse[part], nats[part], z_loss, softcap)
            low = g.to(hidden.dtype)
            if needs[0]:
                torch.mm(low, weight, out=d_hidden[part])
            if needs[1]:
                if wide == low.dtype:
                    d_weight.addmm_(low.T, hidden[part])
                else:
                    d_weight += low.T @ hidden[part]
            if d_bias is not None:
                d_bias += g.sum(0)
        z_part = z_loss * (scale * lse.square()).sum()
        loss = (scale * nats).sum() + z_part
        ctx.gradients = (d_hidden, None if d_weight is None else d_weight.to(weight.dtype),
                         None if d_bias is None else d_bias.to(bias.dtype))
        ctx.mark_non_differentiable(z_part, nats, lse, hits)
        return loss, z_part, nats, lse, hits

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):  # noqa: ANN001, ANN002, ANN205
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this loss were given out; call it again for a second backward pass")
        return (*(None if g is None else g.mul_(upstream.to(g.dtype)) for g in gradients), *[None] * 6)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, wide: torch.dtype) -> Tensor:
    logits = (x @ weight.T).to(wide)
    if bias is not None:
        logits += bias
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _statistics(logits: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(hits, lse, nats) of rows. The loss is log(sum) - (target - max), both shifted: large logits do not cancel."""
    peak, place = logits.max(-1)
    target = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    log_sum = (logits - peak.unsqueeze(1)).exp_().sum(-1).log_()
    return (place == targets) & valid, peak + log_sum, (log_sum - (target - peak)) * valid


def _gradient(logits: Tensor, targets: Tensor, scale: Tensor, lse: Tensor, nats: Tensor, z_loss: float,
              softcap: float | None) -> Tensor:
    """Turn capped logits [rows, V] in place into the gradient of the loss with respect to the uncapped ones.

    The target's entry, p - 1, is formed as expm1(-nats): the difference would lose its digits as p -> 1, and nats
    come from shifted rows, so large logits do not blur them. (Ignored rows have scale 0.)
    """
    slope = None if softcap is None else 1 - (logits / softcap).square()
    factor = scale if z_loss == 0 else scale * (1 + 2 * z_loss * lse)
    g = logits.sub_(lse.unsqueeze(1)).exp_().mul_(factor.unsqueeze(1))
    entry = torch.expm1(-nats) * scale + (factor - scale) * torch.exp(-nats)
    g.scatter_(1, targets.unsqueeze(1), entry.unsqueeze(1))
    return g if slope is None else g.mul_(slope)


IMPLEMENTATION = Implementation("torch", run, frozenset({"cpu", "cuda"}))
