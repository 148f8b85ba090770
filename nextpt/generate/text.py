"""Text generation: several prompts at once, several samples of each, streamed piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataPrepError, UserError
from nextpt.generate.decoding import DecodingBatch
from nextpt.generate.sample import Sampling, continuation_rng, distribution, draw
from nextpt.generate.stopping import IncrementalDetokenizer, StopStringFilter
from nextpt.model import Decoder

# Called with (number of the prompt, number of the sample, a piece of text)
TextCallback = Callable[[int, int, str], None]


def ignore_text(prompt: int, sample: int, piece: str) -> None:
    """`TextCallback` that does nothing."""


class FinishReason(StrEnum):
    """Why a continuation ended."""

    DOCUMENT = "end"  # the model ended the document
    STOP = "stop"  # a stop string occurred
    LENGTH = "length"  # `max_tokens` were generated
    CONTEXT = "context"  # the model's positions end


@dataclass(frozen=True)
class GenerationConfig:
    """What to generate.

    Attributes:
        sampling: How each token is chosen.
        max_tokens: Most tokens of a continuation.
        stop: Strings that end a continuation and are not part of its text.
        samples: Continuations of each prompt.
        batch_size: Continuations that are decoded together. The tokens are the same at any size,
            except where rounding decides between two.

    Raises:
        UserError: A number is below 1, or a stop string is empty.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 200
    stop: tuple[str, ...] = ()
    samples: int = 1
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("max_tokens", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be >= 1")
        if not all(self.stop):
            raise UserError("a stop string is empty: every text contains it; leave it out")


@dataclass
class Continuation:
    """One continuation of a prompt.

    Attributes:
        prompt: Number of the prompt.
        sample: Number of the sample of that prompt.
        tokens: All tokens that were chosen, those of the end of the document and of a stop string
            included.
        logprobs: Log-probability of each token, nats, under the model's own distribution (no
            temperature, nothing cut off).
        text: Without the prompt and the stop string.
        finish_reason: Why it ended; None while it grows.
    """

    prompt: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None


def text_tokens(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """Encode a text behind the start token.

    Args:
        tokenizer: Encodes the text.
        text: Any text.
        name: What the text is called in errors.

    Raises:
        UserError: The text cannot be encoded.
    """
    # Python keeps bytes of the command line that are no UTF-8 as lone surrogates
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name} is not UTF-8")
    try:
        return [tokenizer.start_id, *tokenizer.encode(text).tolist()]
    except DataPrepError as error:
        raise UserError(f"{name} cannot be encoded: {error}") from None


def prompt_tokens(
    model: Decoder, tokenizer: Tokenizer, prompt: str, name: str = "the prompt"
) -> list[int]:
    """Encode a prompt that leaves room for a continuation.

    Raises:
        UserError: The prompt cannot be encoded, or fills the model's positions.
    """
    tokens = text_tokens(tokenizer, prompt, name)
    if len(tokens) >= model.max_position:
        raise UserError(
            f"{name} has {len(tokens):,} tokens with the start token; the model's positions end at"
            f" {model.max_position:,}: shorten it"
        )
    return tokens


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    on_text: TextCallback = ignore_text,
) -> Iterator[Continuation]:
    """Continue prompts.

    A continuation that reaches the model's last position ends there: the context is not shifted.

    Args:
        model: In evaluation mode.
        tokenizer: Decodes the tokens.
        prompts: Tokens of each prompt, from `prompt_tokens`.
        config: What to generate.
        on_text: Gets text as it grows: whole characters, and never a part of a stop string.

    Yields:
        The continuations of all prompts in order, those of one prompt together.
    """
    pairs = [(p, s) for p in range(len(prompts)) for s in range(config.samples)]
    for first in range(0, len(pairs), config.batch_size):
        rows = [
            _Row(model, tokenizer, prompts[p], p, s, config, on_text)
            for p, s in pairs[first : first + config.batch_size]
        ]
        _decode(model, rows, config.sampling)
        yield from (row.result for row in rows)


class _Row:
    """A continuation in progress."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        number: int,
        sample: int,
        config: GenerationConfig,
        on_text: TextCallback,
    ) -> None:
        self.prompt = prompt
        self.result = Continuation(number, sample)
        self.rng = continuation_rng(config.sampling.seed, number, sample)
        room = model.max_position - len(prompt)
        self.max_tokens = min(config.max_tokens, room)
        self._last_reason = (
            FinishReason.LENGTH if config.max_tokens <= room else FinishReason.CONTEXT
        )
        self._end_id = tokenizer.end_id
        self._on_text = on_text
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt)
        self._stop_filter = StopStringFilter(config.stop)

    def add(self, token: int, logprob: float) -> None:
        """Append the next token; sets `result.finish_reason` when it was the last."""
        result = self.result
        result.tokens.append(token)
        result.logprobs.append(logprob)
        if token == self._end_id:
            result.finish_reason = FinishReason.DOCUMENT
        else:
            self._filter(self._detokenizer.add(token))
            if self._stop_filter.matched:
                result.finish_reason = FinishReason.STOP
            elif len(result.tokens) == self.max_tokens:
                result.finish_reason = self._last_reason
        if result.finish_reason not in (None, FinishReason.STOP):
            self._filter(self._detokenizer.flush())
            self._emit(self._stop_filter.flush())

    def _filter(self, pieces: Iterator[str]) -> None:
        for piece in pieces:
            self._emit(self._stop_filter.add(piece))

    def _emit(self, text: str) -> None:
        if text:
            self.result.text += text
            self._on_text(self.result.prompt, self.result.sample, text)


def _decode(model: Decoder, rows: list[_Row], sampling: Sampling) -> None:
    """Decode rows together until each has ended; those that have leave the batch."""
    numbers = sorted({row.result.prompt for row in rows})
    prompts = {row.result.prompt: row.prompt for row in rows}
    longest = max(len(row.prompt) for row in rows)
    batch = DecodingBatch(
        model, [prompts[n] for n in numbers], longest + max(row.max_tokens for row in rows)
    )
    batch.take([numbers.index(row.result.prompt) for row in rows])
    seen_BV = _seen_tokens(batch.logits_BV, rows)
    while True:
        probabilities = distribution(batch.logits_BV, sampling, seen_BV)
        tokens = draw(
            probabilities, torch.tensor([row.rng.random() for row in rows], dtype=torch.float64)
        )
        logprobs = batch.logits_BV.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        seen_BV.scatter_(1, tokens.unsqueeze(1), True)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.add(token, logprob)
        unfinished = [i for i, row in enumerate(rows) if row.result.finish_reason is None]
        if not unfinished:
            return
        if len(unfinished) < len(rows):
            batch.take(unfinished)
            rows = [rows[i] for i in unfinished]
            tokens, seen_BV = tokens[unfinished], seen_BV[unfinished]
        batch.append(tokens)


def _seen_tokens(logits_BV: Tensor, rows: list[_Row]) -> Tensor:
    """Mark the tokens of each prompt, bool [B, V].

    The start token is left out: in many vocabularies it is the end token too.
    """
    seen = torch.zeros_like(logits_BV, dtype=torch.bool)
    for i, row in enumerate(rows):
        seen[i, list(row.prompt[1:])] = True
    return seen


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
