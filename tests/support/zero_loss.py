"""A rank that trains our loss under DeepSpeed and compares every gradient with plain torch's.

`python -m tests.support.zero_loss OUTPUT.json`: {case: {parameter: largest difference over the
largest value}}.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, TOKENS, MICRO_BATCHES, STEPS, LR = 97, 16, 24, 3, 2, 0.5


class Model(nn.Module):
    """Embedding, one layer, output matrix (the embedding's own if tied)."""

    def __init__(self, tied: bool, recompute: bool) -> None:
        from kernels.cross_entropy import LinearCrossEntropy

        super().__init__()
        torch.manual_seed(0)
        self.recompute = recompute
        self.embedding, self.layer = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        weight = self.embedding.weight if tied else nn.Parameter(torch.randn(VOCABULARY, WIDTH))
        self.head = LinearCrossEntropy(
            weight, nn.Parameter(torch.zeros(VOCABULARY)), chunk_tokens=10
        )

    def forward(
        self, tokens: Tensor, targets: Tensor, weights: Tensor, weight_sum: Tensor
    ) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        if self.recompute:
            return checkpoint(
                self.head, hidden, targets, weights, weight_sum, 1e-3, use_reentrant=False
            ).loss
        return self.head(hidden, targets, weights, weight_sum, 1e-3).loss

    def plain(self, tokens: Tensor, targets: Tensor, weights: Tensor, weight_sum: Tensor) -> Tensor:
        """The same loss through all logits."""
        logits = F.linear(
            torch.tanh(self.layer(self.embedding(tokens))), self.head.weight, self.head.bias
        )
        nats = F.cross_entropy(logits, targets, reduction="none")
        terms = weights * (targets != -100) * (nats + 1e-3 * logits.logsumexp(-1).square())
        return terms.sum() / weight_sum


def batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, targets, weights [N]; some targets are ignored, unevenly over micro-batches."""
    g = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    tokens, targets = torch.randint(0, VOCABULARY, (2, TOKENS), generator=g)
    targets[: 7 * micro + 3 * rank] = -100
    return tokens, targets, torch.rand(TOKENS, generator=g)


def compare(
    stage: int, tied: bool, recompute: bool, scaled: bool, rank: int, ranks: int
) -> dict[str, float]:
    """Train with our loss, and a plain copy on the data of all ranks.

    Args:
        stage: ZeRO stage.
        tied: Whether the output matrix is the embedding.
        recompute: Whether the loss is computed again in the backward pass.
        scaled: Whether DeepSpeed divides the loss by the number of micro-batches, so that the
            gradient of the loss is not 1.
        rank: This rank.
        ranks: Number of ranks.

    Returns:
        Parameter -> largest difference of its gradients, relative to the largest gradient.
    """
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    model, plain = Model(tied, recompute), Model(tied, False)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=LR), config=settings
    )
    reference = torch.optim.SGD(plain.parameters(), lr=LR)
    worst: dict[str, float] = {}
    for step in range(STEPS):
        everything = [[batch(step, m, r) for m in range(MICRO_BATCHES)] for r in range(ranks)]
        weight_sum = sum((w * (t != -100)).sum() for mine in everything for _, t, w in mine)
        reference.zero_grad()
        factor = 1 / MICRO_BATCHES if scaled else 1.0
        sum(plain.plain(*b, weight_sum) for mine in everything for b in mine).mul(factor).backward()
        for micro in everything[rank]:
            loss = engine(*micro, weight_sum)
            engine.backward(loss * ranks, scale_wrt_gas=scaled)
            if engine.is_gradient_accumulation_boundary():
                for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                    gradient = deepspeed.utils.safe_get_full_grad(p)
                    gradient = p.grad if gradient is None else gradient
                    worst[name] = max(
                        worst.get(name, 0.0),
                        float((gradient - q.grad).abs().max() / q.grad.abs().max()),
                    )
            engine.step()
        reference.step()
    return worst


def main(output: str) -> None:
    from nextpt.train.process_group import start_distributed

    start_distributed()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    differences = {}
    for stage, tied, recompute, scaled in itertools.product(
        range(4), (False, True), (False, True), (False, True)
    ):
        differences[f"{stage} {tied} {recompute} {scaled}"] = compare(
            stage, tied, recompute, scaled, rank, ranks
        )
    if rank == 0:
        Path(output).write_text(json.dumps(differences))


if __name__ == "__main__":
    main(*sys.argv[1:])
