"""Gradient noise and update ratios on real ranks, and the same by brute force.

One JSON for all ZeRO stages.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextpt.config import Config
from nextpt.data.batch import IGNORE_INDEX, Batch
from nextpt.model import Decoder, build_decoder
from nextpt.objective import local_weight_sum, next_token_loss
from nextpt.train.dynamics import component_of, noise_scale
from nextpt.train.engine import Engine
from nextpt.train.process_group import start_distributed
from tests.support.datasets import tiny

TOKENS, ROWS, MICRO, ALL, STEPS = 16, 64, 2, 8, 50  # ALL: micro-batches of a step, over all ranks


def config_of(stage: int, lr: float) -> Config:
    return tiny(
        Path("."),
        Path("."),
        data={"sequence_length": TOKENS},
        model={"vocab_size": 64, "width": 32, "heads": 2, "kv_heads": 1},
        guard={"spike_sigma": None},
        train={"zero_stage": stage, "micro_batch_size": MICRO, "global_batch_size": MICRO * ALL},
        optimizer={"lr": lr},
    )


def population(seed: int = 0) -> torch.Tensor:
    """Sequences of TOKENS + 1: a repeated token with noise, for gradients with mean and spread."""
    chance = torch.Generator().manual_seed(seed)
    sequences = torch.randint(0, 16, (ROWS, 1), generator=chance).expand(ROWS, TOKENS + 1).clone()
    noisy = torch.rand(sequences.shape, generator=chance) < 0.5
    return torch.where(noisy, torch.randint(0, 64, sequences.shape, generator=chance), sequences)


def batch_of(sequences: torch.Tensor, ignored: int = 0) -> Batch:
    """A batch of whole sequences.

    Of the first one `ignored` targets count for nothing, so that micro-batches are uneven.
    """
    count = len(sequences)
    weights = torch.ones(count, TOKENS)
    weights[0, :ignored] = 0
    nothing = torch.zeros(count, TOKENS, dtype=torch.int32)
    return Batch(
        tokens=sequences[:, :-1],
        targets=torch.where(weights > 0, sequences[:, 1:], IGNORE_INDEX),
        position_ids=torch.arange(TOKENS).expand(count, -1),
        document_ids=nothing,
        token_weights=weights,
        target_bytes=nothing,
        is_text=weights > 0,
        domain_ids=torch.zeros(count, dtype=torch.long),
        sequence_numbers=torch.arange(count),
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32) * TOKENS,
    )


def brute_force(model: Decoder, sequences: torch.Tensor) -> tuple[float, float]:
    """(tr(S), |G|^2) of one target's mean gradient, from the gradient of every single sequence."""
    gradients = []
    for sequence in sequences:
        model.zero_grad()
        batch = batch_of(sequence[None])
        next_token_loss(model, batch, TOKENS).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    g = torch.stack(gradients)
    mean = g.mean(dim=0)
    return TOKENS * float((g - mean).square().sum(dim=1).mean()), float(mean.square().sum())


def measured(stage: int, device: torch.device) -> dict[str, Any]:
    """Mean trace and B_simple of many steps that hardly move the weights."""
    engine = Engine(config_of(stage, 1e-12), device)
    sequences, chance = population(), np.random.default_rng(1)
    own, estimates = ALL // engine.world_size, []
    for _ in range(STEPS):
        drawn = torch.from_numpy(chance.integers(0, ROWS, (ALL, MICRO)))[
            engine.rank * own : (engine.rank + 1) * own
        ]
        batches = [batch_of(sequences[draw]) for draw in drawn]
        weights = engine.all_reduce(local_weight_sum(batches))
        engine.step(batches, weights, 1e-12, measure=True)
        estimates.append(
            engine.gradient_noise(own, weights, engine.spike_detector.read()[-1].grad_norm)
        )
    engine.step(batches, weights, 1e-12)
    return {
        "trace": float(np.mean([e["trace"] for e in estimates])),
        "scale": noise_scale(estimates),
        "unmeasured": engine.gradient_noise(own, weights, 1.0),
    }


def uneven(device: torch.device) -> dict[str, float]:
    """Estimates of one step of uneven micro-batches, and those from each micro-batch's gradient."""
    config, sequences = config_of(0, 1e-12), population()
    batches = [batch_of(sequences[MICRO * i : MICRO * (i + 1)], ignored=i) for i in range(ALL)]
    model, gradients, counts = (
        build_decoder(config),
        [],
        [float(b.token_weights.sum()) for b in batches],
    )
    for batch, count in zip(batches, counts, strict=True):
        model.zero_grad()
        next_token_loss(model, batch, count).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    total = sum(counts)
    step = float(sum(c / total * g for c, g in zip(counts, gradients, strict=True)).square().sum())
    trace = (
        (
            sum(c / total * float(g.square().sum()) for c, g in zip(counts, gradients, strict=True))
            - step
        )
        * total
        / (ALL - 1)
    )
    engine = Engine(config, device)
    mine = batches[engine.rank :: engine.world_size]
    weights = engine.all_reduce(local_weight_sum(mine))
    engine.step(mine, weights, 1e-12, measure=True)
    estimate = engine.gradient_noise(len(mine), weights, engine.spike_detector.read()[-1].grad_norm)
    return estimate | {"expected_trace": trace, "expected_square": step - trace / total}


def updates(stage: int, device: torch.device) -> list[dict[str, list[float]]]:
    """For three steps, component -> (update ratio, norm of the change / norm of the weights)."""
    engine, sequences, steps = Engine(config_of(stage, 1e-3), device), population(), []

    def weights() -> dict[str, torch.Tensor]:
        return {f.name: f.tensor.clone() for f in engine.state.fragments() if f.kind == "weight"}

    for step in range(3):
        before = weights()
        batches = [
            batch_of(sequences[MICRO * i : MICRO * (i + 1)])
            for i in range(step, step + ALL // engine.world_size)
        ]
        engine.step(batches, engine.all_reduce(local_weight_sum(batches)), 1e-3)
        after, ratios = weights(), {}
        for kind, ratio in engine.update_ratios().items():
            own = [name for name in after if component_of(name) == kind]
            squares = [
                sum((float(t.double().square().sum()) for t in ts), 0.0)
                for ts in ([after[n] - before[n] for n in own], [after[n] for n in own])
            ]
            moved, size = engine.all_reduce(torch.tensor(squares, dtype=torch.float64)).tolist()
            ratios[kind] = [ratio, math.sqrt(moved / size)]
        steps.append(ratios)
    return steps


def main(path: str) -> None:
    device = start_distributed()
    trace, square = brute_force(build_decoder(config_of(0, 1e-12)), population())
    result = {"brute_force": {"trace": trace, "scale": trace / square}, "uneven": uneven(device)}
    result |= {
        f"zero-{stage}": measured(stage, device) | {"updates": updates(stage, device)}
        for stage in range(4)
    }
    if torch.distributed.get_rank() == 0:
        Path(path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
