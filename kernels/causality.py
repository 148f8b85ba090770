"""Causality check: attention does not look ahead, by perturbation and by gradient.

It runs on any implementation. The intervention keeps all shapes: replacing tokens tests what is
seen, shortening the input would test how sums are ordered.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.attention import PackedDocuments, attention

Attend = Callable[[Tensor, Tensor], Tensor]
# Of two rows: the first has two documents, the second three
LENGTHS = ((5, 7), (1, 8, 3))


class CausalityError(AssertionError):
    """An output depends on a token that it must not see."""


def check_attention(
    implementation: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    window: int | None = None,
    sinks: bool = False,
    head_dim: int = 16,
    group: int = 2,
) -> None:
    """Check that no output depends on a later token, nor on another document of the row.

    Perturbation: keys and values of one position are replaced; outputs that may not see it must not
    change by a bit. Gradient: the derivative of one output by all keys and values must be exactly 0
    where it may not look.

    Args:
        implementation: a name of `kernels.choice.ATTENTION`, or "auto".
        device: where to run it.
        dtype: of queries, keys and values.
        window: keys that a query sees.
        sinks: whether a logit per head takes part in the softmax.
        head_dim: width of queries, keys and values; kernels differ by it, and may not fit.
        group: queries per key head, of which there are two.

    Raises:
        CausalityError: an output depends on what it must not see, or not on what it sees.
    """
    generator = torch.Generator().manual_seed(0)
    shape, kv_shape = (2, 12, 2 * group, head_dim), (2, 12, 2, head_dim)
    q, k, v = (
        torch.randn(s, generator=generator).to(device, dtype) for s in (shape, kv_shape, kv_shape)
    )
    logits = torch.linspace(-1, 1, shape[2]).to(device, dtype) if sinks else None
    lengths = torch.tensor([length for row in LENGTHS for length in row])
    numbers = torch.tensor([number for row in LENGTHS for number in range(len(row))])
    ids = numbers.repeat_interleave(lengths).view(shape[:2]).to(device, torch.int32)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    for documents in (None, PackedDocuments(ids, starts)):
        allowed = _allowed(ids if documents is not None else torch.zeros_like(ids), window)

        def run(k: Tensor, v: Tensor, documents: PackedDocuments | None = documents) -> Tensor:
            return attention(
                q,
                k,
                v,
                documents=documents,
                window=window,
                sinks=logits,
                implementation=implementation,
            )

        _check_perturbation(run, k, v, allowed)
        _check_gradient(run, k, v, allowed)


def _allowed(ids: Tensor, window: int | None) -> Tensor:
    """Boolean [B, S, S] by the definition, position by position: query i may see key j."""
    rows, length = ids.shape
    allowed = torch.zeros(rows, length, length, dtype=torch.bool)
    listed = ids.tolist()
    for b in range(rows):
        for i in range(length):
            for j in range(i + 1):
                allowed[b, i, j] = listed[b][i] == listed[b][j] and (
                    window is None or i - j < window
                )
    return allowed.to(ids.device)


def _check_perturbation(run: Attend, k: Tensor, v: Tensor, allowed: Tensor) -> None:
    before = run(k, v)
    for j in range(k.shape[1]):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, j] += 1.0
        changed_v[:, j] -= 1.0
        changed = (run(changed_k, changed_v) != before).flatten(2).any(-1)
        _compare(changed, allowed[:, :, j], f"replacing token {j}")


def _check_gradient(run: Attend, k: Tensor, v: Tensor, allowed: Tensor) -> None:
    k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
    out = run(k, v).float()
    for i in range(out.shape[1]):
        gradients = torch.autograd.grad(out[:, i].sum(), (k, v), retain_graph=True)
        depends = torch.stack([g.flatten(2).ne(0).any(-1) for g in gradients]).any(0)
        _compare(depends, allowed[:, i], f"the gradient of output {i}")


def _compare(depends: Tensor, allowed: Tensor, intervention: str) -> None:
    """Raise where the dependence is not exactly the allowed one.

    What is allowed must depend too, or the check would see nothing at all.
    """
    if bool((depends & ~allowed).any()):
        raise CausalityError(
            f"{intervention} reaches tokens that may not see it, (row, token):"
            f" {(depends & ~allowed).nonzero().tolist()}"
        )
    if not bool((depends == allowed).all()):
        raise CausalityError(
            f"{intervention} does not reach tokens that see it, (row, token):"
            f" {(allowed & ~depends).nonzero().tolist()}"
        )
