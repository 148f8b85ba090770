"""Trial of an implementation of the vocabulary's cross-entropy in the shapes of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.cross_entropy.chunking import Gradient
from kernels.cross_entropy.interface import LossOutput, linear_cross_entropy
from kernels.trials import SECONDS, Trial, judge, median_milliseconds

# Of the largest value; gradients of 16-bit matrices are rounded, and summed over chunks
TOLERANCE = {torch.float32: 0.001, torch.float16: 0.02, torch.bfloat16: 0.05}
COMPARED_TOKENS = 256  # the reference writes out all of their logits
MODULE = __name__

by_triton = partial(linear_cross_entropy, implementation="triton")
by_torch = partial(linear_cross_entropy, implementation="torch")


@dataclass(frozen=True)
class LossShape:
    """What the loss of a micro-batch has to compute.

    Attributes:
        tokens: hidden states, N.
        width: of each, D.
        vocab_size: rows of the output matrix, V.
        dtype: name of the torch dtype of both.
        gradient: how the matrix gradient is summed over chunks.
        logits_fp32: whether logits of 16-bit inputs are fp32.
        workspace_bytes: of what exists beside inputs and gradients; None for the default.
        softcap: of the logits, or None.
        seconds: for which it is timed.
    """

    tokens: int
    width: int
    vocab_size: int
    dtype: str
    gradient: Gradient = "precise"
    logits_fp32: bool = False
    workspace_bytes: int | None = None
    softcap: float | None = None
    seconds: float = SECONDS

    def try_candidate(
        self, name: str, function: Callable[..., LossOutput], device: torch.device
    ) -> Trial:
        """Compare an implementation with the reference, then time a micro-batch."""
        return judge(
            name,
            lambda: self._largest_error(function, device),
            TOLERANCE[getattr(torch, self.dtype)],
            lambda: self._milliseconds(function, device),
        )

    def _milliseconds(self, function: Callable[..., LossOutput], device: torch.device) -> float:
        hidden, weight, targets = self._draw(self.tokens, device)

        def step() -> None:
            loss = function(hidden, weight, targets, **self._options()).loss
            torch.autograd.grad(loss, (hidden, weight))

        return median_milliseconds(step, device, self.seconds)

    def _options(self) -> dict[str, Any]:
        return {
            "gradient": self.gradient,
            "logits_dtype": torch.float32 if self.logits_fp32 else None,
            "workspace_bytes": self.workspace_bytes,
            "softcap": self.softcap,
            "z_loss_coefficient": 1e-4,
        }

    def _draw(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, D], matrix [V, D], with logits of unit variance, and targets [N]."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        generator = torch.Generator(device).manual_seed(0)
        hidden, weight = (
            torch.randn(size, self.width, generator=generator, device=device).to(dtype)
            for size in (tokens, self.vocab_size)
        )
        weight = weight / self.width**0.5
        targets = torch.randint(self.vocab_size, (tokens,), generator=generator, device=device)
        return hidden.requires_grad_(), weight.requires_grad_(), targets

    def _largest_error(self, function: Callable[..., LossOutput], device: torch.device) -> float:
        """Of nats and gradients beside the reference in fp32, relative to the largest value."""
        hidden, weight, targets = self._draw(min(self.tokens, COMPARED_TOKENS), device)
        wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
        results = []
        for run, inputs in (
            (function, (hidden, weight)),
            (partial(linear_cross_entropy, implementation="reference"), wide),
        ):
            options = self._options() | ({} if run is function else {"logits_dtype": None})
            output = run(*inputs, targets, **options)
            gradients = torch.autograd.grad(output.loss, inputs)
            results.append([t.detach().float() for t in (output.nats, *gradients)])
        errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True)]
        return float(torch.stack(errors).max())  # NaN if one is


def function_paths() -> Mapping[str, str]:
    """Return the implementations of the loss by name, as "module:name"."""
    return {name: f"{MODULE}:by_{name}" for name in ("triton", "torch")}
