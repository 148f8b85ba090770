"""Decoders loaded from checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from nextpt.exchange.decoder import load_model
from nextpt.model import build_decoder
from tests.support.datasets import tiny


def test_a_checkpoint_of_a_gpu_run_is_read_on_a_cpu() -> None:
    """The checkpoint names kernels and a workspace of another machine."""
    # 20 tokens of it take more than a MiB
    model = {"vocab_size": 20000, "depth": 1, "width": 32, "heads": 4}
    config = tiny(
        Path("none"),
        Path("none"),
        model=model | {"attention": "triton", "cross_entropy": "triton"},
        train={"loss_workspace_mib": 1},
    )
    source = build_decoder(config)
    weights = {name: p.detach() for name, p in source.named_parameters()}
    checkpoint = SimpleNamespace(
        state={"config": config.model_dump(mode="json")},
        folder=Path("none"),
        check_weights=lambda shapes: None,
        read_whole=weights.__getitem__,
    )
    _, loaded = load_model(checkpoint)
    tokens = torch.arange(20).unsqueeze(0)
    hidden = loaded(tokens, tokens).hidden
    assert torch.isfinite(loaded.lm_head(hidden[0], tokens[0]).nats).all()
