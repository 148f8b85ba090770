"""Models that the transformers library runs, for architectures that nextpt cannot express."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from kernels.cross_entropy import LossOutput
from nextpt.base.errors import CheckpointError
from nextpt.data.batch import IGNORE_INDEX
from nextpt.model import DecoderOutput

# Keys of a config.json that give the longest input
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")


class LogitHead(nn.Module):
    """Stands in for a Decoder's `lm_head`; its input are logits already."""

    if TYPE_CHECKING:  # torch.nn.Module.__call__ is untyped

        @overload
        def __call__(self, logits: Tensor) -> Tensor: ...

        @overload
        def __call__(
            self, logits: Tensor, targets: Tensor, weights: Tensor, weight_sum: float = 1.0
        ) -> LossOutput: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor | LossOutput:
            """Run `forward`."""

    def forward(
        self,
        logits: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        weight_sum: float = 1.0,
    ) -> Tensor | LossOutput:
        """Return the logits, or with targets the same as a Decoder's `lm_head`."""
        if targets is None or weights is None:
            return logits
        nats = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        loss = (nats * weights).sum() / weight_sum
        hits = (logits.argmax(-1) == targets) & (targets != IGNORE_INDEX)
        lse = logits.float().logsumexp(-1)
        return LossOutput(loss, torch.zeros_like(loss), nats, lse, hits)


class HuggingFaceModel(nn.Module):
    """A transformers model that scores text as a Decoder does.

    It has the calls model(tokens, positions) and model.lm_head(...). It has no key-value cache.

    Args:
        inner: A causal language model of the transformers library.
        max_position: Longest input, tokens.
    """

    def __init__(self, inner: Any, max_position: int) -> None:
        super().__init__()
        self.inner = inner
        self.max_position = max_position
        self.lm_head = LogitHead()

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return int(self.inner.get_output_embeddings().weight.shape[0])

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> HuggingFaceModel:
        """Read a local folder: safetensors only, and no code of the folder is run.

        Raises:
            CheckpointError: transformers is not installed or cannot read the folder, or its
                config.json does not say how long inputs may be.
        """
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
        lengths = (getattr(inner.config, key, None) for key in LENGTH_KEYS)
        max_position = next((length for length in lengths if length), None)
        if max_position is None:
            raise CheckpointError(
                f"{folder}/config.json does not say how long inputs may be; expected one of"
                f" {', '.join(LENGTH_KEYS)}"
            )
        return cls(inner, max_position).to(device).eval()

    if TYPE_CHECKING:  # torch.nn.Module.__call__ is untyped

        def __call__(self, tokens: Tensor, positions: Tensor) -> DecoderOutput:
            """Run `forward`."""

    def forward(self, tokens: Tensor, positions: Tensor) -> DecoderOutput:
        """Compute logits [B, T, V] in the place of hidden states.

        Args:
            tokens: Token ids, int64 [B, T].
            positions: int64 [B, T]; they must count from 0, since not every architecture takes
                positions.
        """
        return DecoderOutput(self.inner(input_ids=tokens, use_cache=False).logits, {})
