"""Lockstep coding: encoder and decoder run the model with the same shapes, token by token.

A writer that computes all probabilities at once and a reader that computes them one by one get
other last bits from the same model, and one of 2^30 parts is enough to lose the file: encoding in
parallel and decoding step by step corrupts every file. So the writer goes step by step too, with
the same shapes. The tokens are cut into sequences of equal length (the last one shorter), which are
one batch, and one coder takes them in turn: sequence 0, sequence 1, ... of the first step, then of
the second.

Context. A sequence begins with the start token. When `window` positions are full, it begins anew
with the last half of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch

from nextpt.evaluate.coding.coder import RangeDecoder, RangeEncoder
from nextpt.evaluate.coding.frequencies import cumulative
from nextpt.evaluate.progress import Progress, ignore_progress
from nextpt.generate.decoding import DecodingBatch
from nextpt.model import Decoder


class TokenCoder(ABC):
    """Codes one token: the encoder takes it from the file, the decoder from the code."""

    @abstractmethod
    def code(self, sequence: int, step: int, ends: np.ndarray) -> int:
        """Code the token at a step of a sequence and return it.

        Args:
            sequence: Number of the sequence.
            step: Number of the step.
            ends: Edges of the tokens' parts of 2^BITS, int64 [V + 1].
        """


class TokenEncoder(TokenCoder):
    """Encodes the tokens of a file.

    Args:
        tokens: int64 [count].
        sequences: Sequences that `run_lockstep` cuts them into.
    """

    def __init__(self, tokens: np.ndarray, sequences: int) -> None:
        self.tokens = tokens
        self.steps = -(-len(tokens) // sequences)
        self.coder = RangeEncoder()

    def code(self, sequence: int, step: int, ends: np.ndarray) -> int:
        """Encode the file's next token."""
        token = int(self.tokens[sequence * self.steps + step])
        start = int(ends[token])
        self.coder.encode(start, int(ends[token + 1]) - start)
        return token


class TokenDecoder(TokenCoder):
    """Decodes tokens from the bytes that a `TokenEncoder`'s coder wrote."""

    def __init__(self, data: bytes) -> None:
        self.coder = RangeDecoder(data)

    def code(self, sequence: int, step: int, ends: np.ndarray) -> int:
        """Decode the next token."""
        token = int(np.searchsorted(ends, self.coder.peek(), side="right")) - 1
        start = int(ends[token])
        self.coder.take(start, int(ends[token + 1]) - start)
        return token


def run_lockstep(
    model: Decoder,
    start_id: int,
    coder: TokenCoder,
    count: int,
    sequences: int,
    window: int,
    progress: Progress = ignore_progress,
) -> tuple[np.ndarray, float]:
    """Code `count` tokens by a model's predictions.

    Args:
        model: In evaluation mode.
        start_id: The start token.
        coder: Encodes or decodes.
        count: Number of tokens.
        sequences: Sequences that are coded together, at most `count`.
        window: Positions of a sequence's context, at least 2.
        progress: Gets the share of the steps that is done.

    Returns:
        The tokens, int64 [count], and the model's code length of them in bits.
    """
    steps = -(-count // sequences)
    tokens, bits = np.zeros((sequences, steps), np.int64), 0.0
    # The last sequences may have a step less: they keep step, but nothing of them is coded.
    coded = [
        [sequence * steps + step < count for step in range(steps)] for sequence in range(sequences)
    ]
    contexts: list[list[int]] = [[start_id] for _ in range(sequences)]
    batch = DecodingBatch(model, contexts, window)
    for step in range(steps):
        ends = cumulative(batch.logits_BV)
        logprobs = batch.logits_BV.double().log_softmax(1).numpy()
        for sequence in range(sequences):
            if coded[sequence][step]:
                token = coder.code(sequence, step, ends[sequence])
                tokens[sequence, step] = token
                bits -= logprobs[sequence, token] / np.log(2)
            contexts[sequence].append(int(tokens[sequence, step]))
        if step + 1 == steps:
            break
        if len(contexts[0]) > window:
            contexts = [context[-(window // 2) :] for context in contexts]
            batch = DecodingBatch(model, contexts, window)
        else:
            batch.append(torch.from_numpy(tokens[:, step]))
        progress((step + 1) / steps)
    progress(1.0)
    return tokens.reshape(-1)[:count], bits
