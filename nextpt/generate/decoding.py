"""The model over several growing texts: logits of the next token, with a key-value cache.

Shapes: B rows, V vocabulary. The texts are padded on the left, so that all of them end in the last
column; a row's positions count from its own first token, and its tokens do not see the padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention import LeftPadded
from nextpt.config import Config
from nextpt.model import Decoder, KVCache

PADDING = 0  # any id: nothing sees it


class Decoding:
    """Rows of tokens that grow by one token each at a time.

    logits_BV: fp32 on the CPU, of the token after each row: there arithmetic repeats bit for bit.
    """

    def __init__(
        self, config: Config, model: Decoder, texts: Sequence[Sequence[int]], capacity: int
    ) -> None:
        """texts: tokens of each row, at least one. capacity: columns that the cache has room for, the longest text's included."""
        self._model, parameter = model, next(model.parameters())
        longest = max(len(text) for text in texts)
        assert min(len(text) for text in texts) > 0 and longest <= capacity
        tokens = torch.full((len(texts), longest), PADDING)
        for row, text in enumerate(texts):
            tokens[row, longest - len(text) :] = torch.tensor(text)
        self._pad(torch.tensor([longest - len(text) for text in texts], device=parameter.device))
        self._cache = KVCache.empty(
            model.spec, len(texts), capacity, dtype=parameter.dtype, device=parameter.device
        )
        self._run(tokens)

    def feed(self, tokens_B: Tensor) -> None:
        """Append one token, int64, to each row."""
        self._run(tokens_B.unsqueeze(1))

    def take(self, rows: Sequence[int]) -> None:
        """Go on with some rows; one may be taken several times."""
        index = torch.tensor(rows)
        self.logits_BV = self.logits_BV[index]
        index = index.to(self._padding.device)
        self._cache = self._cache.take(index)
        self._pad(self._padding[index])

    def _pad(self, padding: Tensor) -> None:
        # Read here, so that no step waits for the device
        self._padding, self._padded = padding, bool(padding.any())

    @torch.no_grad()
    def _run(self, tokens_BT: Tensor) -> None:
        device, before, new = self._padding.device, self._cache.length, tokens_BT.shape[1]
        columns = torch.arange(before, before + new, device=device)
        positions = (columns - self._padding.unsqueeze(1)).clamp_min(0)
        documents = LeftPadded(self._padding, new, before + new) if self._padded else None
        hidden = self._model(tokens_BT.to(device), positions, documents, cache=self._cache)
        self.logits_BV: Tensor = self._model.lm_head(hidden[:, -1]).float().cpu()
