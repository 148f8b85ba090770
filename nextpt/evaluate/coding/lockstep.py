"""The one function that both sides run: rows of a file grow by a token each, in step, and the coder hears them in order.

A writer that computes all probabilities at once and a reader that computes them one by one get
other last bits from the same model, and one of 2^30 parts is enough to lose the file: encoding in
parallel and decoding step by step corrupts every one. So the writer goes step by step too, with the
same shapes. The tokens are cut into rows of equal length (the last one shorter), which are one
batch, and one coder takes them in turn: row 0, row 1, ... of the first step, then of the second.

Context. A row begins with the start token. When `window` positions are full, the row begins anew
with the last half of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch

from nextpt.config import Config
from nextpt.evaluate.coding.coder import Decoder, Encoder
from nextpt.evaluate.coding.frequencies import cumulative
from nextpt.generate.decoding import Decoding
from nextpt.model import Decoder as Model


class Side(ABC):
    """What becomes of a token whose part of 2^BITS is known: the writer takes it from the file, the reader from the code."""

    @abstractmethod
    def token(self, row: int, step: int, ends: np.ndarray) -> int:
        """ends: int64 [V + 1], where the parts begin and end."""


class Writing(Side):
    """tokens: int64 [count], which `run` cuts into so many rows."""

    def __init__(self, tokens: np.ndarray, rows: int) -> None:
        self.tokens, self.steps, self.coder = tokens, -(-len(tokens) // rows), Encoder()

    def token(self, row: int, step: int, ends: np.ndarray) -> int:
        token = int(self.tokens[row * self.steps + step])
        start = int(ends[token])
        self.coder.encode(start, int(ends[token + 1]) - start)
        return token


class Reading(Side):
    """data: what `Writing` made."""

    def __init__(self, data: bytes) -> None:
        self.coder = Decoder(data)

    def token(self, row: int, step: int, ends: np.ndarray) -> int:
        token = int(np.searchsorted(ends, self.coder.peek(), side="right")) - 1
        start = int(ends[token])
        self.coder.take(start, int(ends[token + 1]) - start)
        return token


def run(
    config: Config,
    model: Model,
    start_id: int,
    side: Side,
    count: int,
    rows: int,
    window: int,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[np.ndarray, float]:
    """(tokens int64 [count], the model's code length of them in bits). rows: at most count.

    window: positions, at least 2.
    """
    steps = -(-count // rows)
    tokens, bits = np.zeros((rows, steps), np.int64), 0.0
    # The last rows may have a step less: they keep step, but nothing of them is coded.
    coded = [[row * steps + step < count for step in range(steps)] for row in range(rows)]
    kept: list[list[int]] = [[start_id] for _ in range(rows)]
    decoding = Decoding(config, model, kept, window)
    for step in range(steps):
        ends = cumulative(decoding.logits_BV)
        logs = decoding.logits_BV.double().log_softmax(1).numpy()
        for row in range(rows):
            if coded[row][step]:
                token = side.token(row, step, ends[row])
                tokens[row, step] = token
                bits -= logs[row, token] / np.log(2)
            kept[row].append(int(tokens[row, step]))
        if step + 1 == steps:
            break
        if len(kept[0]) > window:
            kept = [texts[-(window // 2) :] for texts in kept]
            decoding = Decoding(config, model, kept, window)
        else:
            decoding.feed(torch.from_numpy(tokens[:, step]))
        progress((step + 1) / steps)
    progress(1.0)
    return tokens.reshape(-1)[:count], bits
