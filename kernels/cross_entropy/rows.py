"""Row work of the loss, on logits z [V] with targets t_1..t_K: definition, and torch's version.

    lse = log sum_j exp z_j              nats_k = lse - z_{t_k}
    gradient_j = A p_j - sum_k b_k [j = t_k] + flat,   A = sum_k b_k + linear + 2 square lse,   p =
    exp(z - lse)

b_k weighs nats_k, linear weighs lse, square weighs lse^2 and flat is added to every column, which
is all that weights, z-loss, label smoothing and upstream gradients need. Row statistics keep their
digits: the sum leaves the targets out, so that nats = log1p(others / target) is exact as p -> 1,
and so is the target's own gradient, b (p - 1) = b expm1(-nats). lse is kept as peak + log_sum:
large logits do not cancel.

A soft cap turns z into c tanh(z / c) first, and multiplies the gradient by 1 - tanh^2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NO_TARGET = -1  # in targets; all else that is not in the vocabulary is an error
# Elements worked on at once on a CPU: 16 rows of a 50K vocabulary; several passes stay in its
# caches.
BLOCK_ELEMENTS = 2**20


class Statistics(NamedTuple):
    """Statistics of n rows of logits; fp32 (fp64 for fp64).

    Attributes:
        nats: [n, K], -log p of the targets; 0 where there is none.
        peak: [n], the largest logit.
        log_sum: [n], with lse = peak + log_sum.
        total: [n], sum of logits, or None where it is not needed.
        hits: bool [n, K], whether the target's logit is above all others.
    """

    nats: Tensor
    peak: Tensor
    log_sum: Tensor
    total: Tensor | None
    hits: Tensor

    @classmethod
    def empty(
        cls, rows: int, targets: int, dtype: torch.dtype, device: torch.device, total: bool
    ) -> Statistics:
        """Allocate; `total`: with the sums of logits."""
        nats, hits = (
            torch.empty(rows, targets, dtype=d, device=device) for d in (dtype, torch.bool)
        )
        peak, log_sum, summed = (torch.empty(rows, dtype=dtype, device=device) for _ in range(3))
        return cls(nats, peak, log_sum, summed if total else None, hits)

    def part(self, rows: slice) -> Statistics:
        """Return views of some rows."""
        total = None if self.total is None else self.total[rows]
        return Statistics(
            self.nats[rows], self.peak[rows], self.log_sum[rows], total, self.hits[rows]
        )


class Coefficients(NamedTuple):
    """Coefficients of the gradient of n rows, see above; all but b may be None.

    Attributes:
        b: [n, K], 0 where a row has no target. It counts in A also where the target is in another
            rank's slice of the vocabulary.
        linear: [n].
        square: [n].
        flat: [n].
    """

    b: Tensor
    linear: Tensor | None
    square: Tensor | None
    flat: Tensor | None

    def part(self, rows: slice) -> Coefficients:
        """Return views of some rows."""
        others = (None if t is None else t[rows] for t in (self.linear, self.square, self.flat))
        return Coefficients(self.b[rows], *others)


def mark_absent(targets: Tensor, ignore_index: int) -> Tensor:
    """Return the targets with NO_TARGET for ignore_index.

    Other negative targets are moved down by one, so that they stay errors.
    """
    return torch.where(
        targets == ignore_index, NO_TARGET, torch.where(targets < 0, targets - 1, targets)
    )


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raise ValueError for a target, as mark_absent leaves it, outside the vocabulary.

    It waits for the device.
    """
    if not targets.numel():
        return
    least, most = (int(t) for t in targets.aminmax())
    if most >= vocabulary or least < NO_TARGET:
        target = most if most >= vocabulary else least + 1
        raise ValueError(
            f"target {target} is not in the vocabulary of {vocabulary} entries; ignore_index marks"
            " tokens without one"
        )


def work(
    logits: Tensor,
    gradient: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    statistics: Statistics,
    coefficients: Coefficients | None,
    known: bool,
) -> None:
    """Compute the statistics, then the gradient, of n rows.

    Args:
        logits: [n, V] without bias and cap; kept where there is no gradient.
        gradient: [n, V], written unless None; may be `logits` itself.
        bias: [V] or None.
        targets: int64 [n, K], NO_TARGET where there is none.
        softcap: cap of the logits, or None.
        statistics: written, unless they are `known`.
        coefficients: of the gradient; None without one.
        known: whether the statistics are read.
    """
    step = max(BLOCK_ELEMENTS // logits.shape[1], 1)
    for first in range(0, logits.shape[0], step):
        part = slice(first, first + step)
        block = logits[part].to(statistics.nats.dtype)  # the slab itself where the dtypes agree
        if bias is not None:
            block = block + bias
        slope = None
        if softcap is not None:
            block = (block / softcap).tanh_()
            # From tanh itself: dividing c tanh by c again would round it twice
            slope = None if gradient is None else 1 - block.square()
            block.mul_(softcap)
        elif gradient is None and block.data_ptr() == logits[part].data_ptr():
            block = block.clone()
        chunk = statistics.part(part)
        columns, present = targets[part].clamp_min(0), targets[part] >= 0
        if known:
            block.sub_(chunk.peak.unsqueeze(1)).sub_(chunk.log_sum.unsqueeze(1)).exp_()
        else:
            _describe(block, columns, present, chunk)
        if gradient is not None and coefficients is not None:
            g = _gradient(block, columns, present, chunk, coefficients.part(part), known)
            gradient[part] = g if slope is None else g.mul_(slope)


def _describe(z: Tensor, columns: Tensor, present: Tensor, out: Statistics) -> None:
    """Fill `out`; z becomes exp(z - peak), 0 at the targets."""
    if out.total is not None:
        out.total.copy_(z.sum(-1))
    same = _same(columns, present)
    logit = z.gather(1, columns)
    target = logit.masked_fill(~present, -torch.inf)
    z.scatter_(1, columns, torch.where(same.any(-1), -torch.inf, logit))
    rival = z.amax(-1, keepdim=True)
    peak = torch.maximum(rival, target.amax(-1, keepdim=True))
    other_targets = target.unsqueeze(1).masked_fill(same, -torch.inf).amax(-1)
    out.hits.copy_((target > rival) & (target > other_targets))
    out.peak.copy_(peak.squeeze(1))
    rest = z.sub_(peak).exp_().sum(-1, keepdim=True)
    shifted = target - peak
    e = shifted.exp()
    once = e * (present & ~same.tril(-1).any(-1))  # each column once, however many targets it is
    log_sum = (rest + once.sum(-1, keepdim=True)).log()
    out.log_sum.copy_(log_sum.squeeze(1))
    others = rest + once.unsqueeze(1).masked_fill(same, 0.0).sum(-1)
    nats = torch.where(others < e, torch.log1p(others / e), log_sum - shifted)
    out.nats.copy_(torch.where(present, nats, 0.0))


def _gradient(
    z: Tensor, columns: Tensor, present: Tensor, known: Statistics, c: Coefficients, whole: bool
) -> Tensor:
    """Z holds p (if whole) or exp(z - peak).

    It becomes the gradient with respect to the capped logits.
    """
    rest = torch.zeros_like(known.peak).unsqueeze(1)
    if c.linear is not None:
        rest = rest + c.linear.unsqueeze(1)
    if c.square is not None:
        rest = rest + 2 * (c.square * (known.peak + known.log_sum)).unsqueeze(1)
    a = c.b.sum(-1, keepdim=True) + rest
    same = _same(columns, present)
    z.mul_(a if whole else a * torch.exp(-known.log_sum).unsqueeze(1))
    z.masked_fill_(a == 0, 0.0)  # a row without weight may hold inf or nan
    mine = (c.b.unsqueeze(1) * same).sum(-1)
    # What weighs p but is not the target's own. Not a - mine, whose error is that of mine, however
    # small the others are.
    others = (c.b.unsqueeze(1) * ~same).sum(-1) + rest
    entry = mine * torch.expm1(-known.nats) + others * torch.exp(-known.nats)
    # An absent target writes what its place holds or, where that is another's column, what that one
    # writes.
    entry = torch.where(present, entry, z.gather(1, columns)).gather(1, _writer(same))
    z.scatter_(1, columns, entry)
    return z if c.flat is None else z.add_(c.flat.unsqueeze(1))


def _same(columns: Tensor, present: Tensor) -> Tensor:
    """Bool [n, k, j]: target j is there and is the column of target k."""
    return (columns.unsqueeze(2) == columns.unsqueeze(1)) & present.unsqueeze(1)


def _writer(same: Tensor) -> Tensor:
    """[n, K]: for each k the first target that is there in its column.

    K itself where there is none.
    """
    return torch.where(
        same.any(-1), same.int().argmax(-1), torch.arange(same.shape[1], device=same.device)
    )
