"""Memory estimates against measured ranks: peak resident memory of three training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextpt.train.memory import estimate_memory
from tests.support.datasets import tiny
from tests.support.memory_probe import measure

LARGE = {
    "vocab_size": 512,
    "depth": 6,
    "width": 512,
    "heads": 8,
    "kv_heads": None,
    "qk_norm": False,
}
LONG = {"vocab_size": 512, "depth": 8, "width": 256, "heads": 8, "kv_heads": None, "qk_norm": False}
SMALL_BATCH = {"global_batch_size": 2, "micro_batch_size": 1}
LARGE_BATCH = {"global_batch_size": 64, "micro_batch_size": 64}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "train", "ranks"),
    [
        (LARGE, SMALL_BATCH | {"zero_stage": 0}, 1),
        (LARGE, SMALL_BATCH | {"zero_stage": 1}, 2),
        (LARGE, SMALL_BATCH | {"zero_stage": 2}, 2),
        (LARGE, SMALL_BATCH | {"zero_stage": 3}, 2),
        (LARGE, SMALL_BATCH | {"zero_stage": 1, "precision": "bf16"}, 2),
        (LARGE, SMALL_BATCH | {"zero_stage": 2, "precision": "bf16"}, 2),
        (LONG, LARGE_BATCH | {"zero_stage": 1}, 1),
        (LONG, LARGE_BATCH | {"zero_stage": 1, "activation_checkpointing": True}, 1),
        (LONG | {"attention_sinks": True}, LARGE_BATCH | {"zero_stage": 1}, 1),
        (LONG | {"mtp_depth": 4}, LARGE_BATCH | {"zero_stage": 1}, 1),
    ],
    ids=lambda value: (
        "-".join(f"{v}" for v in value.values()) if isinstance(value, dict) else str(value)
    ),
)
def test_estimates_are_within_a_quarter_of_the_measured_memory(
    dataset: Path, tmp_path: Path, model: dict[str, Any], train: dict[str, Any], ranks: int
) -> None:
    config = tiny(dataset, tmp_path / "run", model=model, train=train)
    measured = measure(config, ranks, tmp_path / "job")
    estimated = estimate_memory(config, ranks).total
    print(
        f"estimated {estimated / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB, ratio"
        f" {estimated / measured:.2f}"
    )
    assert abs(estimated / measured - 1) < 0.25
