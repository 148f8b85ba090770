"""Checkpoints of small untrained models, and their logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextpt.base.collective import RankGroup
from nextpt.checkpoint.commit import save
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.checkpoint.state import Fragment
from nextpt.config import Config
from nextpt.model import Decoder, build_decoder
from tests.support.datasets import tiny

KINDS = ("weight", "exp_avg", "exp_avg_sq")
POSITIONS = 40


class ModelState:
    """A `ShardedState` of one rank around a plain decoder."""

    def __init__(self, model: Decoder) -> None:
        self.parameters = {name: p.detach() for name, p in model.named_parameters()}

    def fragments(self) -> Iterator[Fragment]:
        for name, p in self.parameters.items():
            for kind in KINDS:
                yield Fragment(
                    name,
                    kind,
                    tuple(p.shape),
                    0,
                    p.numel(),
                    p.reshape(-1) if kind == "weight" else torch.zeros(p.numel()),
                )

    def scalars(self) -> dict[str, float]:
        return {"optimizer_updates": 3.0}

    def state_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        return {name: dict.fromkeys(KINDS, tuple(p.shape)) for name, p in self.parameters.items()}


def decoder(**model: Any) -> tuple[Config, Decoder]:
    """A small decoder; no parameter has its initial 0 or 1, so that leaving one out shows."""
    base = {
        "vocab_size": 96,
        "depth": 2,
        "width": 32,
        "heads": 4,
        "kv_heads": 2,
        "max_position": POSITIONS,
        "init_std": 0.2,
    }
    config = tiny(
        Path("none"),
        Path("none"),
        data={"sequence_length": 16},
        model=base | {"qk_norm": False} | model,
    )
    module = build_decoder(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in module.named_parameters():
            if p.dim() == 1:
                p.add_(torch.empty_like(p).uniform_(-0.5, 0.5, generator=generator))
    return config, module.eval()


def checkpoint_of(
    config: Config, model: Decoder, root: Path, step: int = 3, **extras: Any
) -> Checkpoint:
    """Save it as a step of a run, with further parts of state.json, and open the newest."""
    save(
        root,
        ModelState(model),
        {"step": step, "config": config.model_dump(mode="json"), **extras},
        {},
        RankGroup.world(),
    )
    return open_checkpoint(root)


def our_logits(model: Decoder, tokens_BT: Tensor) -> Tensor:
    """fp32 [B, T, V]."""
    positions = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    with torch.no_grad():
        return model.lm_head(model(tokens_BT, positions).hidden.flatten(0, 1)).view(
            *tokens_BT.shape, -1
        )


def some_tokens(vocab_size: int, length: int = POSITIONS) -> Tensor:
    """int64 [2, length]."""
    return torch.randint(
        0,
        vocab_size,
        (2, length),
        generator=torch.Generator().manual_seed(math.prod((length, vocab_size))),
    )
