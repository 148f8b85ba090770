"""Incremental decoding of a batch of token rows, with a key-value cache.

Shapes: B rows, V vocabulary. The rows are padded on the left, so that all of them end in the last
column; a row's positions count from its own first token, and its tokens do not see the padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention import LeftPadded
from nextpt.model import Decoder, KVCache

PADDING = 0  # any id: no token attends to it


class DecodingBatch:
    """Rows of tokens that grow by one token at a time.

    Args:
        model: In evaluation mode.
        prompts: Tokens of each row, at least one.
        capacity: Columns of the cache; at least the longest prompt's length.

    Attributes:
        logits_BV: Logits of the token after each row, fp32 on the CPU, where arithmetic repeats bit
            for bit.
    """

    logits_BV: Tensor

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], capacity: int) -> None:
        self._model, parameter = model, next(model.parameters())
        longest = max(len(prompt) for prompt in prompts)
        assert min(len(prompt) for prompt in prompts) > 0 and longest <= capacity
        tokens = torch.full((len(prompts), longest), PADDING)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        lengths = [longest - len(prompt) for prompt in prompts]
        self._set_padding(torch.tensor(lengths, device=parameter.device))
        self._cache = KVCache.empty(
            model.spec, len(prompts), capacity, dtype=parameter.dtype, device=parameter.device
        )
        self._forward(tokens)

    def append(self, tokens_B: Tensor) -> None:
        """Append one token, int64, to each row."""
        self._forward(tokens_B.unsqueeze(1))

    def take(self, rows: Sequence[int]) -> None:
        """Keep only some rows; a row may be taken several times."""
        index = torch.tensor(rows)
        self.logits_BV = self.logits_BV[index]
        index = index.to(self._padding.device)
        self._cache = self._cache.take(index)
        self._set_padding(self._padding[index])

    def _set_padding(self, padding: Tensor) -> None:
        self._padding = padding
        # The flag is read now, so that no step waits for the device
        self._documents = LeftPadded(padding) if bool(padding.any()) else None

    @torch.no_grad()
    def _forward(self, tokens_BT: Tensor) -> None:
        device, before, new = self._padding.device, self._cache.length, tokens_BT.shape[1]
        columns = torch.arange(before, before + new, device=device)
        positions = (columns - self._padding.unsqueeze(1)).clamp_min(0)
        output = self._model(tokens_BT.to(device), positions, self._documents, cache=self._cache)
        self.logits_BV = self._model.lm_head(output.hidden[:, -1]).float().cpu()
