"""Beam search: the continuations that the model finds most probable as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import UserError
from nextpt.config import Config
from nextpt.generate.decoding import Decoding
from nextpt.generate.stopping import GrowingText, StopStrings
from nextpt.generate.text import Continuation, Ending, Wanted
from nextpt.model import Decoder


@dataclass(frozen=True)
class Beams:
    """width: hypotheses that are kept. length_penalty: alpha of `score`.

    0 compares sums, which favours short ones.

    0.6 to 0.7 was best for translation (arXiv 1609.08144, section 7). Raises UserError for a value
    out of bounds.
    """

    width: int
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"beams = {self.width} must be >= 1")
        if not 0 <= self.length_penalty < float("inf"):
            raise UserError(f"length_penalty = {self.length_penalty} must be >= 0")

    def score(self, logprob: float, length: int) -> float:
        """Log P(Y) / lp(Y), lp(Y) = (5 + |Y|)^alpha / (5 + 1)^alpha (arXiv 1609.08144, eq. 14). length: tokens, the end's too."""
        return logprob * (6 / (5 + length)) ** self.length_penalty


@dataclass(frozen=True)
class _Hypothesis:
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    ending: Ending | None = None

    @property
    def logprob(self) -> float:
        return sum(self.logprobs)


def beam_search(
    config: Config,
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    wanted: Wanted,
    beams: Beams,
    number: int = 0,
) -> list[Continuation]:
    """The `wanted.samples` best finished hypotheses, best first, of one prompt (of `prompt_tokens`).

    A hypothesis is finished at the end of the document, at a stop string, after `wanted.max_tokens`
    or where the positions end. The search stops when no other one can come among the best, since a
    log-probability only falls. number: the prompt's, for the result. Raises UserError when more are
    wanted than there are beams.
    """
    if wanted.samples > beams.width:
        raise UserError(
            f"samples = {wanted.samples} of beams = {beams.width}: as many hypotheses are kept as"
            " there are beams; ask for more beams"
        )
    room = config.max_position - len(prompt)
    most = min(wanted.max_tokens, room)
    last = Ending.LENGTH if wanted.max_tokens <= room else Ending.CONTEXT
    decoding = Decoding(config, model, [prompt], len(prompt) + most)
    live, done = [_Hypothesis()], []
    for length in range(1, most + 1):
        candidates = [
            (parent, _judged(h, tokenizer, prompt, wanted.stop))
            for parent, h in _expand(decoding, live, 2 * beams.width)
        ]
        if length == most:
            candidates = [
                (parent, h if h.ending else _Hypothesis(h.tokens, h.logprobs, last))
                for parent, h in candidates
            ]
        done += [h for _, h in candidates if h.ending]
        done = sorted(done, key=lambda h: -beams.score(h.logprob, len(h.tokens)))[: beams.width]
        going = [(parent, h) for parent, h in candidates if not h.ending][: beams.width]
        if not going or _settled(done, going[0][1], most, beams):
            break
        decoding.take([parent for parent, _ in going])
        live = [h for _, h in going]
        decoding.feed(torch.tensor([h.tokens[-1] for h in live]))
    return [
        _result(h, tokenizer, prompt, wanted.stop, number, place)
        for place, h in enumerate(done[: wanted.samples])
    ]


def _expand(
    decoding: Decoding, live: list[_Hypothesis], most: int
) -> list[tuple[int, _Hypothesis]]:
    """The most probable continuations by one token, best first, each with the row that it comes from."""
    logprobs_BV = decoding.logits_BV.log_softmax(-1)
    sums_BV = logprobs_BV.double() + torch.tensor(
        [h.logprob for h in live], dtype=torch.float64
    ).unsqueeze(1)
    places = sums_BV.flatten().topk(min(most, sums_BV.numel())).indices
    rows, tokens = places // sums_BV.shape[1], places % sums_BV.shape[1]
    return [
        (row, _Hypothesis((*live[row].tokens, token), (*live[row].logprobs, logprob)))
        for row, token, logprob in zip(
            rows.tolist(), tokens.tolist(), logprobs_BV[rows, tokens].tolist(), strict=True
        )
    ]


def _settled(done: list[_Hypothesis], best: _Hypothesis, most: int, beams: Beams) -> bool:
    """Whether the beams are all finished, and the best that goes on cannot become better than the last of them."""
    bound = beams.score(best.logprob, most)
    return len(done) == beams.width and beams.score(done[-1].logprob, len(done[-1].tokens)) >= bound


def _judged(
    hypothesis: _Hypothesis, tokenizer: Tokenizer, prompt: Sequence[int], stops: tuple[str, ...]
) -> _Hypothesis:
    """With its ending, where the last token is the end's or completes a stop string."""
    ending = None
    if hypothesis.tokens[-1] == tokenizer.end_id:
        ending = Ending.DOCUMENT
    elif stops and _text(hypothesis, tokenizer, prompt, stops)[1]:
        ending = Ending.STOP
    return _Hypothesis(hypothesis.tokens, hypothesis.logprobs, ending)


def _text(
    hypothesis: _Hypothesis, tokenizer: Tokenizer, prompt: Sequence[int], stops: tuple[str, ...]
) -> tuple[str, bool]:
    """The text up to a stop string, and whether there was one."""
    growing, stopping = GrowingText(tokenizer, prompt), StopStrings(stops)
    shown = [
        stopping.add(piece)
        for token in hypothesis.tokens
        for piece in growing.add(token)
        if not stopping.found
    ]
    shown += [stopping.add(piece) for piece in growing.rest() if not stopping.found]
    return "".join(shown) + stopping.rest(), stopping.found


def _result(
    hypothesis: _Hypothesis,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    stops: tuple[str, ...],
    number: int,
    place: int,
) -> Continuation:
    text, _ = _text(hypothesis, tokenizer, prompt, stops)
    return Continuation(
        number, place, list(hypothesis.tokens), list(hypothesis.logprobs), text, hypothesis.ending
    )
