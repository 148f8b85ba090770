"""From prompts to text: several prompts at once, several samples of each, heard piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataPrepError, UserError
from nextpt.config import Config
from nextpt.generate.decoding import Decoding
from nextpt.generate.sample import Sampling, distribution, draw, randomness
from nextpt.generate.stopping import GrowingText, StopStrings
from nextpt.model import Decoder

# Number of the prompt, number of the sample, a piece of text
Hear = Callable[[int, int, str], None]


class Ending(StrEnum):
    """Why a continuation ended."""

    DOCUMENT = "end"  # the model ended the document
    STOP = "stop"  # a stop string came
    LENGTH = "length"  # as many tokens as were asked for
    CONTEXT = "context"  # the model's positions end there


@dataclass(frozen=True)
class Wanted:
    """What to generate. max_tokens: of each continuation. stop: texts that end it. samples: continuations of each prompt.

    batch_size: continuations that are decoded together; the same tokens come at any size but where
    rounding decides. Raises UserError for a number below 1 and an empty stop string.
    """

    sampling: Sampling = Sampling()
    max_tokens: int = 200
    stop: tuple[str, ...] = ()
    samples: int = 1
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("max_tokens", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be >= 1")
        if not all(self.stop):
            raise UserError("a stop string is empty: every text holds it; leave it out")


@dataclass
class Continuation:
    """One continuation of a prompt.

    tokens: all that were chosen, the end of the document and those of a stop string too. logprobs:
    of each, nats, under the model's own distribution (no temperature, nothing cut off). text:
    without the prompt and the stop string.
    """

    prompt: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    ending: Ending | None = None


def text_tokens(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """The start token and those of a text.

    Raises UserError, which begins with `name`, for a text that cannot be encoded.
    """
    # How Python holds bytes of the command line that are none
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name} is not UTF-8")
    try:
        return [tokenizer.start_id, *tokenizer.encode(text).tolist()]
    except DataPrepError as error:
        raise UserError(f"{name} cannot be encoded: {error}") from None


def prompt_tokens(
    config: Config, tokenizer: Tokenizer, prompt: str, name: str = "the prompt"
) -> list[int]:
    """`text_tokens` of a prompt. Raises UserError also where they leave no room."""
    tokens = text_tokens(tokenizer, prompt, name)
    if len(tokens) >= config.max_position:
        raise UserError(
            f"{name} has {len(tokens):,} tokens with the start token; the model's positions end at"
            f" {config.max_position:,}: shorten it"
        )
    return tokens


def generate(
    config: Config,
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    wanted: Wanted,
    hear: Hear = lambda prompt, sample, piece: None,
) -> Iterator[Continuation]:
    """Yield the continuations of all prompts (of `prompt_tokens`), samples of one prompt together, in order.

    hear: gets text as it grows; a character spread over several tokens comes when it is whole, and
    never a part of a stop string. A continuation that reaches the model's last position ends there:
    the context is not moved.
    """
    wishes = [(p, s) for p in range(len(prompts)) for s in range(wanted.samples)]
    for first in range(0, len(wishes), wanted.batch_size):
        rows = [
            _Row(config, tokenizer, prompts[p], p, s, wanted, hear)
            for p, s in wishes[first : first + wanted.batch_size]
        ]
        _decode(config, model, rows, wanted.sampling)
        yield from (row.result for row in rows)


class _Row:
    """A continuation under way."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        number: int,
        sample: int,
        wanted: Wanted,
        hear: Hear,
    ) -> None:
        self.prompt, self.result = prompt, Continuation(number, sample)
        self.random = randomness(wanted.sampling.seed, number, sample)
        room = config.max_position - len(prompt)
        self.most = min(wanted.max_tokens, room)
        self._at_most = Ending.LENGTH if wanted.max_tokens <= room else Ending.CONTEXT
        self._end_id, self._hear = tokenizer.end_id, hear
        self._growing, self._stops = GrowingText(tokenizer, prompt), StopStrings(wanted.stop)

    def add(self, token: int, logprob: float) -> None:
        """Take the next token; sets result.ending when it was the last."""
        result = self.result
        result.tokens.append(token)
        result.logprobs.append(logprob)
        if token == self._end_id:
            result.ending = Ending.DOCUMENT
        else:
            self._say(self._growing.add(token))
            if self._stops.found:
                result.ending = Ending.STOP
            elif len(result.tokens) == self.most:
                result.ending = self._at_most
        if result.ending in (Ending.DOCUMENT, Ending.LENGTH, Ending.CONTEXT):
            self._say(self._growing.rest())
            self._give(self._stops.rest())

    def _say(self, pieces: Iterator[str]) -> None:
        for piece in pieces:
            self._give(self._stops.add(piece))

    def _give(self, text: str) -> None:
        if text:
            self.result.text += text
            self._hear(self.result.prompt, self.result.sample, text)


def _decode(config: Config, model: Decoder, rows: list[_Row], sampling: Sampling) -> None:
    """Decode rows together until each has ended; those that have leave the batch."""
    numbers = sorted({row.result.prompt for row in rows})
    texts = {row.result.prompt: row.prompt for row in rows}
    longest = max(len(row.prompt) for row in rows)
    decoding = Decoding(
        config, model, [texts[n] for n in numbers], longest + max(row.most for row in rows)
    )
    decoding.take([numbers.index(row.result.prompt) for row in rows])
    seen_BV = _seen(decoding.logits_BV, rows)
    while True:
        probabilities = distribution(decoding.logits_BV, sampling, seen_BV)
        tokens = draw(
            probabilities, torch.tensor([row.random.random() for row in rows], dtype=torch.float64)
        )
        logprobs = decoding.logits_BV.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        seen_BV.scatter_(1, tokens.unsqueeze(1), True)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.add(token, logprob)
        going = [i for i, row in enumerate(rows) if row.result.ending is None]
        if not going:
            return
        if len(going) < len(rows):
            decoding.take(going)
            rows, tokens, seen_BV = [rows[i] for i in going], tokens[going], seen_BV[going]
        decoding.feed(tokens)


def _seen(logits_BV: Tensor, rows: list[_Row]) -> Tensor:
    """True [B, V] for the tokens of each prompt, the start token left out: in many vocabularies it is the end token too."""
    seen = torch.zeros_like(logits_BV, dtype=torch.bool)
    for i, row in enumerate(rows):
        seen[i, list(row.prompt[1:])] = True
    return seen


def pick_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
