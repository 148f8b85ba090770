"""Training objective: weighted next-token loss, normalised once per optimizer step.

    L = - sum_i w_i log P(t_i | t_<i) / sum_i w_i          (nats per token)

The sum of weights runs over the whole optimizer step, all ranks and all micro-batches, so that the
loss and its gradient are those of one big batch however it is divided and however uneven its
documents are. A model's auxiliary losses are added with their coefficients. With D depths of
multi-token prediction (nextpt/model/mtp.py) the loss has w/D times the sum of theirs in addition,
divided by the same sum of weights (arXiv 2412.19437, equations 24 and 25); `nats` has none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import PackedDocuments
from nextpt.data.batch import IGNORE_INDEX, Batch
from nextpt.model import Decoder
from nextpt.model.mtp import shift


class Loss(NamedTuple):
    """Loss of one micro-batch, as its part of the optimizer step's loss.

    Attributes:
        loss: fp32 scalar that is differentiated: the weighted nats, the z-loss and the auxiliary
            losses, each divided by the weight sum of the step.
        z_loss: The z-loss in `loss`, detached scalar.
        nats: -log P of every target, unweighted, detached fp32 [B, T]; 0 where there is no target.
        auxiliary_losses: Name -> its contribution to `loss`, detached scalar.
    """

    loss: Tensor
    z_loss: Tensor
    nats: Tensor
    auxiliary_losses: dict[str, Tensor]


def next_token_loss(
    model: Decoder,
    batch: Batch,
    weight_sum: Tensor | float,
    z_loss_coefficient: float = 0.0,
    auxiliary_coefficients: Mapping[str, float] | None = None,
    mtp_weight: float = 0.0,
) -> Loss:
    """Compute the weighted loss of one micro-batch under teacher forcing.

    Targets that are padding or lie in another document carry weight 0 and are ignored.

    Args:
        model: Returns hidden states and auxiliary losses (`DecoderOutput`).
        batch: The micro-batch.
        weight_sum: Sum of the token weights of the whole optimizer step, fp32 scalar.
        z_loss_coefficient: Coefficient of log^2 Z (PaLM, arXiv 2204.02311 section 5).
        auxiliary_coefficients: Name of an auxiliary loss -> its coefficient, 1 by default. Each
            loss is a mean over a micro-batch; it counts by the micro-batch's share of `weight_sum`,
            so that the step's value is the weighted mean over micro-batches and ranks.
        mtp_weight: Factor of the mean loss over the depths of multi-token prediction.
    """
    documents = PackedDocuments(batch.document_ids, batch.cu_seqlens)
    hidden_BTD, auxiliary_losses, mtp_hidden = model(
        batch.tokens,
        batch.position_ids,
        documents,
        sequence_numbers_B=batch.sequence_numbers,
    )
    output = model.lm_head(
        hidden_BTD.flatten(0, 1),
        batch.targets.flatten(),
        batch.token_weights.flatten(),
        weight_sum,
        z_loss_coefficient,
    )
    loss, contributions = output.loss, {}
    if auxiliary_losses:
        coefficients = auxiliary_coefficients or {}
        share = batch.token_weights.sum() / weight_sum
        for name, auxiliary_loss in auxiliary_losses.items():
            contribution = coefficients.get(name, 1.0) * share * auxiliary_loss.float()
            loss = loss + contribution
            contributions[name] = contribution.detach()
    for k, hidden_BTD in enumerate(mtp_hidden, 1):
        targets, weights = mtp_targets(batch, k)
        part = model.lm_head(
            hidden_BTD.flatten(0, 1), targets.flatten(), weights.flatten(), weight_sum
        )
        contribution = part.loss * (mtp_weight / len(mtp_hidden))
        loss = loss + contribution
        contributions[f"mtp_{k}"] = contribution.detach()
    return Loss(loss, output.z_loss, output.nats.view_as(batch.targets), contributions)


def mtp_targets(batch: Batch, k: int) -> tuple[Tensor, Tensor]:
    """Targets and weights of depth k of multi-token prediction, int64 and fp32 [B, T].

    The target of the token at i is the one k places after its next token, with that token's own
    weight. It is ignored where the token at i + k is in another segment, or the sequence ends.
    """
    same = shift(batch.document_ids, k, fill=-1) == batch.document_ids
    targets = shift(batch.targets, k, fill=IGNORE_INDEX)
    return targets.where(same, IGNORE_INDEX), shift(batch.token_weights, k) * same


def local_weight_sum(batches: list[Batch]) -> Tensor:
    """Sum the token weights over micro-batches; fp32 scalar on their device.

    Ignored targets carry weight 0.
    """
    return torch.stack([batch.token_weights.sum() for batch in batches]).sum()
