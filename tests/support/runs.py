"""Run folders of a small untrained model, for commands that read one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.tokenizer import Tokenizer
from nextpt.config import Config
from nextpt.model import Decoder
from tests.support.models import checkpoint_of, decoder
from tests.support.tokenizers import KINDS


def make_run(
    folder: Path, kind: str = "byte_level", **model: Any
) -> tuple[Config, Decoder, Tokenizer]:
    """Write a run folder with a checkpoint of step 3; returns what `open_model` gives."""
    folder.mkdir(parents=True)
    KINDS[kind](folder / "tokenizer.json")
    tokenizer = Tokenizer(folder / "tokenizer.json")
    config, module = decoder(vocab_size=tokenizer.vocab_size, **model)
    checkpoint_of(config, module, folder / "checkpoints")
    return config, module, tokenizer
