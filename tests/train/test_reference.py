"""A known reference: nanoGPT's small CPU setting on tinyshakespeare, 1.88 nats there.

Minutes long; needs the text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nextpt.config import load_config
from nextpt.model import ModelSpec, count

ROOT = Path(__file__).resolve().parents[2]
TEXT = Path(os.environ.get("NEXTPT_TEST_DATA", "/nowhere")) / "tinyshakespeare.txt"
LOSS = 1.60  # nats per character, with Muon; the config's seed ends at 1.56
NANOGPT_LOSS, NANOGPT_PARAMETERS, NANOGPT_CHARACTERS = 1.88, 804_096, 2000 * 12 * 64


def test_no_more_parameters_and_tokens_than_nanogpt() -> None:
    """nanoGPT: 65 x 128 tokens, 64 x 128 positions, 4 blocks of 12 x 128^2, and nine norms."""
    config = load_config(ROOT / "configs" / "shakespeare_char.yaml")
    assert NANOGPT_PARAMETERS == 65 * 128 + 64 * 128 + 4 * (12 * 128**2 + 2 * 128) + 128
    assert count(ModelSpec.from_config(config)).parameters <= NANOGPT_PARAMETERS
    assert config.total_tokens == NANOGPT_CHARACTERS and config.data.sequence_length == 64


@pytest.mark.slow
@pytest.mark.skipif(
    not TEXT.is_file(), reason="NEXTPT_TEST_DATA does not name a folder with tinyshakespeare.txt"
)
def test_the_loss_is_far_below_that_of_nanogpt(tmp_path: Path) -> None:
    def nextpt(*arguments: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        completed = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert completed.returncode == 0, completed.stderr[-2000:]

    nextpt(
        "prep",
        "shards",
        f"shakespeare={TEXT}",
        "--output",
        str(tmp_path / "data"),
        "--sequence-length",
        "64",
        "--characters",
        "--validation-fraction",
        "0.1",
        "--split",
        "tail",
    )
    nextpt(
        "train",
        "--config",
        "configs/shakespeare_char.yaml",
        f"data.path={tmp_path / 'data'}",
        f"run.dir={tmp_path / 'run'}",
    )
    nextpt(
        "eval",
        "--run",
        str(tmp_path / "run"),
        "--stride",
        "64",
        "--json",
        str(tmp_path / "result.json"),
    )
    figures = json.loads((tmp_path / "result.json").read_text())["domains"]["shakespeare"]
    assert figures["tokens"] == figures["bytes"] == 111_540
    assert figures["nats_per_token"] <= LOSS < NANOGPT_LOSS
