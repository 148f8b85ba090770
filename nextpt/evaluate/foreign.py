"""A model of the transformers library, run by that library, where ours cannot express it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.cross_entropy import LossOutput
from nextpt.base.errors import CheckpointError
from nextpt.config import Config, parse_config
from nextpt.data.batch import IGNORE_INDEX

# Keys of a config.json that say how long inputs may be
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")


class LogitHead(nn.Module):
    """Stands where a Decoder's lm_head does; what it is given are logits already."""

    def forward(
        self,
        logits: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        weight_sum: float = 1.0,
    ) -> Tensor | LossOutput:
        """Return the logits without targets, else the loss and its statistics, as LinearCrossEntropy."""
        if targets is None:
            return logits
        nats = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        loss = (nats * weights).sum() / weight_sum
        hits = (logits.argmax(-1) == targets) & (targets != IGNORE_INDEX)
        lse = logits.float().logsumexp(-1)
        return LossOutput(loss, torch.zeros_like(loss), nats, lse, hits)


class ForeignModel(nn.Module):
    """Has a Decoder's calls for scoring: model(tokens, positions), then model.lm_head(...). positions must count from 0, as they do there."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.lm_head = inner, LogitHead()

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> ForeignModel:
        """From safetensors only, without code of the folder's own. Raises CheckpointError."""
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise CheckpointError(
                f"{folder} is of an architecture that nextpt cannot express, and transformers,"
                " which may run it, is not installed; pip install transformers"
            ) from None
        try:
            inner = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
        except Exception as error:  # the library raises OSError, ValueError, KeyError and its own
            raise CheckpointError(
                f"{folder} cannot be read by transformers: {str(error).strip().splitlines()[0]}"
            ) from None
        return cls(inner).to(device).eval()

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, T, V]. tokens, positions: int64 [B, T]."""
        # Not every architecture takes positions
        return self.inner(input_ids=tokens, use_cache=False).logits


def foreign_config(folder: Path, model: ForeignModel) -> Config:
    """A config that says only what scoring asks: vocabulary and positions.

    Its other figures describe no model.
    """
    described = model.inner.config
    positions = next((value for key in LENGTHS if (value := getattr(described, key, None))), None)
    if positions is None:
        raise CheckpointError(
            f"{folder}/config.json does not say how long inputs may be; expected one of"
            f" {', '.join(LENGTHS)}"
        )
    return parse_config(
        {
            "run": {"name": "foreign"},
            "data": {"path": str(folder), "sequence_length": positions},
            "model": {
                "vocab_size": model.inner.get_output_embeddings().weight.shape[0],
                "depth": 1,
                "width": 64,
                "heads": 1,
                "max_position": positions,
            },
            "optimizer": {"lr": 1e-5},
            "schedule": {"warmup": 1},
            "train": {"steps": 2, "global_batch_size": 1, "micro_batch_size": 1},
        },
        str(folder),
    )
