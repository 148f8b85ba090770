"""Proof that attention does not look ahead: by perturbation and by gradient, for any implementation.

The intervention keeps all shapes: replacing tokens tests what is seen, shortening the input would
test how sums are ordered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import PackedDocuments, attention


class CausalityError(AssertionError):
    """An output depends on a token that it must not see."""


def check_attention(
    implementation: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
) -> None:
    """Raise CausalityError if any output depends on a later token or on another document of the row.

    Perturbation: keys and values of one position are replaced; outputs that may not see it must not
    change by a bit. Gradient: the derivative of one output by all keys and values must be exactly 0
    where it may not look.
    """
    generator = torch.Generator().manual_seed(0)
    shape, kv_shape = (2, 12, 4, 16), (2, 12, 2, 16)
    q, k, v = (
        torch.randn(s, generator=generator).to(device, dtype) for s in (shape, kv_shape, kv_shape)
    )
    ids = torch.tensor(
        [[0] * 5 + [1] * 7, [0] + [1] * 8 + [2] * 3], dtype=torch.int32, device=device
    )
    for documents in (None, PackedDocuments.from_document_ids(ids)):
        allowed = _allowed(ids if documents is not None else torch.zeros_like(ids), window)

        def run(k: Tensor, v: Tensor, documents: PackedDocuments | None = documents) -> Tensor:
            return attention(
                q, k, v, documents=documents, window=window, implementation=implementation
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


def _check_perturbation(run, k: Tensor, v: Tensor, allowed: Tensor) -> None:
    before = run(k, v)
    for j in range(k.shape[1]):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, j] += 1.0
        changed_v[:, j] -= 1.0
        moved = (run(changed_k, changed_v) != before).flatten(2).any(-1)
        _demand(moved, allowed[:, :, j], f"replacing token {j}")


def _check_gradient(run, k: Tensor, v: Tensor, allowed: Tensor) -> None:
    k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
    out = run(k, v).float()
    for i in range(out.shape[1]):
        gradients = torch.autograd.grad(out[:, i].sum(), (k, v), retain_graph=True)
        moved = torch.stack([g.flatten(2).ne(0).any(-1) for g in gradients]).any(0)
        _demand(moved, allowed[:, i], f"the gradient of output {i}")


def _demand(moved: Tensor, allowed: Tensor, what: str) -> None:
    """What moved must be allowed.

    And what is allowed must have moved, or the check sees nothing at all.
    """
    if bool((moved & ~allowed).any()):
        raise CausalityError(
            f"{what} reaches tokens that may not see it, (row, token):"
            f" {(moved & ~allowed).nonzero().tolist()}"
        )
    if not bool((moved == allowed).all()):
        raise CausalityError(
            f"{what} does not reach tokens that see it, (row, token):"
            f" {(allowed & ~moved).nonzero().tolist()}"
        )
