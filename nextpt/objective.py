"""The objective: L = -sum_i w_i log P(t_i | t_<i) / sum_i w_i, in nats per token.

The sum of weights runs over the whole optimizer step, all ranks and all micro-batches, so that the
loss and its gradient are those of one big batch however it is divided and however uneven its
documents are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import PackedDocuments
from nextpt.data.batch import Batch
from nextpt.model import Decoder


class Loss(NamedTuple):
    """total: fp32 scalar, divided by the weight sum, z_loss included. z_loss: detached. nats: detached [B, T]."""

    total: Tensor
    z_loss: Tensor
    nats: Tensor


def next_token_loss(
    model: Decoder, batch: Batch, weight_sum: Tensor | float, z_loss_coefficient: float = 0.0
) -> Loss:
    """Weighted loss of one micro-batch under teacher forcing: every token is the target of those before it.

    weight_sum: sum of token weights of the whole optimizer step (fp32 scalar). z_loss_coefficient:
    factor of log^2 Z (arXiv 2204.02311 section 5). Padding and targets in another document carry weight 0
    and are ignored.
    """
    documents = PackedDocuments.from_document_ids(batch.document_ids)
    hidden_BTD = model(batch.tokens, batch.position_ids, documents)
    output = model.lm_head(
        hidden_BTD.flatten(0, 1),
        batch.targets.flatten(),
        batch.token_weights.flatten(),
        weight_sum,
        z_loss_coefficient,
    )
    return Loss(output.loss, output.z_loss, output.nats.view_as(batch.targets))


def local_weight_sum(batches: list[Batch]) -> Tensor:
    """Sum of token weights over micro-batches, fp32 scalar on their device.

    Ignored targets carry weight 0.
    """
    return torch.stack([batch.token_weights.sum() for batch in batches]).sum()
