"""A decoder with a toy auxiliary loss, trained on gloo ranks.

`python -m tests.support.auxiliary_probe CONFIG.yaml OUT.json` under RANK, ... trains the run of the
config and runs one more step, whose gradient norm rank 0 compares with plain torch's on the whole
batch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from nextpt.config import Config, load_config
from nextpt.model import ComputeOptions, Decoder, DecoderOutput, ModelSpec
from nextpt.objective import local_weight_sum, next_token_loss
from nextpt.observe.trackers import open_trackers
from nextpt.train import engine as engine_module
from nextpt.train.engine import Engine
from nextpt.train.process_group import start_distributed
from nextpt.train.run import run_training
from tests.support.dynamics_probe import batch_of, population

MICRO_BATCHES = 4


class RegularizedDecoder(Decoder):
    """Adds the mean square of the final hidden states, of all tokens alike."""

    def forward(self, *arguments: Any, **options: Any) -> DecoderOutput:
        output = super().forward(*arguments, **options)
        return output._replace(
            auxiliary_losses={"activation": output.hidden.float().square().mean()}
        )


def build(config: Config) -> Decoder:
    """Stands in for `build_decoder`."""
    return RegularizedDecoder(
        ModelSpec.from_config(config),
        seed=config.run.seed,
        options=ComputeOptions.from_config(config),
    )


def one_step(config: Config, device: torch.device) -> dict[str, float]:
    """Loss, auxiliary loss and gradient norm of a first step, and those of plain torch."""
    # Micro-batches of unequal weight: the auxiliary loss of each counts by its share
    sequences = population()
    batches = [batch_of(sequences[2 * i : 2 * i + 2], ignored=3 * i) for i in range(MICRO_BATCHES)]
    engine = Engine(config, device)
    own = batches[engine.rank :: engine.world_size]
    engine.step(own, engine.all_reduce(local_weight_sum(own)), 1e-3)
    verdict = engine.spike_detector.read()[-1]
    result = {"loss": verdict.loss, "norm": verdict.grad_norm} | engine.auxiliary_losses()

    model, total = build(config), local_weight_sum(batches)
    expected = {"loss": 0.0, "activation": 0.0}
    for batch in batches:
        loss = next_token_loss(model, batch, total, config.objective.z_loss_coefficient)
        loss.loss.backward()
        expected["loss"] += float((loss.nats * batch.token_weights).sum() / total)
        hidden = model(batch.tokens, batch.position_ids).auxiliary_losses["activation"]
        expected["activation"] += float(hidden * batch.token_weights.sum() / total)
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    expected["norm"] = float(torch.stack(norms).norm())
    return result | {f"expected_{name}": value for name, value in expected.items()}


def main(config_file: str, out: str) -> None:
    config = load_config(config_file)
    with patch.object(engine_module, "build_decoder", build):
        run_training(config, open_trackers)
        step = one_step(config, start_distributed())
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(step))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
