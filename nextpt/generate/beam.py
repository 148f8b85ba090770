"""Beam search: the continuations that are most probable as a whole, with a length penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import UserError
from nextpt.generate.decoding import DecodingBatch
from nextpt.generate.stopping import IncrementalDetokenizer, StopStringFilter
from nextpt.generate.text import Continuation, FinishReason, GenerationConfig
from nextpt.model import Decoder


@dataclass(frozen=True)
class BeamSearchConfig:
    """Settings of a beam search.

    Attributes:
        width: Hypotheses that are kept at each step.
        length_penalty: alpha of `score`. 0 compares sums of log-probabilities, which favours short
            continuations; 0.6 to 0.7 was best for translation (arXiv 1609.08144, section 7).

    Raises:
        UserError: A value is out of bounds.
    """

    width: int
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"beams = {self.width} must be >= 1")
        if not 0 <= self.length_penalty < float("inf"):
            raise UserError(f"length_penalty = {self.length_penalty} must be >= 0")

    def score(self, logprob: float, length: int) -> float:
        """Score a hypothesis of `length` tokens, the end token included.

        log P(Y) / lp(Y), lp(Y) = (5 + |Y|)^alpha / (5 + 1)^alpha (arXiv 1609.08144, eq. 14).
        """
        return logprob * float((6 / (5 + length)) ** self.length_penalty)


@dataclass(frozen=True)
class _Hypothesis:
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None

    @property
    def logprob(self) -> float:
        return sum(self.logprobs)


def beam_search(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    config: GenerationConfig,
    beams: BeamSearchConfig,
    number: int = 0,
) -> list[Continuation]:
    """Find the best finished hypotheses of one prompt.

    A hypothesis is finished at the end of the document, at a stop string, after `max_tokens` or
    where the positions end. The search stops when no unfinished hypothesis can become one of the
    best, since a log-probability only falls.

    Args:
        model: In evaluation mode.
        tokenizer: Decodes the tokens.
        prompt: Tokens, from `prompt_tokens`.
        config: `samples` is the number of hypotheses to return; its sampling is not used.
        beams: Settings of the search.
        number: Number of the prompt, for the result.

    Returns:
        The `config.samples` best hypotheses, best first.

    Raises:
        UserError: More hypotheses are asked for than there are beams.
    """
    if config.samples > beams.width:
        raise UserError(
            f"samples = {config.samples} of beams = {beams.width}: as many hypotheses are kept as"
            " there are beams; ask for more beams"
        )
    room = model.max_position - len(prompt)
    max_tokens = min(config.max_tokens, room)
    last_reason = FinishReason.LENGTH if config.max_tokens <= room else FinishReason.CONTEXT
    batch = DecodingBatch(model, [prompt], len(prompt) + max_tokens)
    live, finished = [_Hypothesis()], list[_Hypothesis]()
    for length in range(1, max_tokens + 1):
        candidates = [
            (parent, _finish(h, tokenizer, prompt, config.stop))
            for parent, h in _expand(batch, live, 2 * beams.width)
        ]
        if length == max_tokens:
            candidates = [
                (parent, h if h.finish_reason else _Hypothesis(h.tokens, h.logprobs, last_reason))
                for parent, h in candidates
            ]
        finished += [h for _, h in candidates if h.finish_reason]
        finished = sorted(finished, key=lambda h: -beams.score(h.logprob, len(h.tokens)))
        finished = finished[: beams.width]
        unfinished = [(parent, h) for parent, h in candidates if not h.finish_reason][: beams.width]
        if not unfinished or _is_settled(finished, unfinished[0][1], max_tokens, beams):
            break
        batch.take([parent for parent, _ in unfinished])
        live = [h for _, h in unfinished]
        batch.append(torch.tensor([h.tokens[-1] for h in live]))
    return [
        _continuation(h, tokenizer, prompt, config.stop, number, rank)
        for rank, h in enumerate(finished[: config.samples])
    ]


def _expand(
    batch: DecodingBatch, live: list[_Hypothesis], count: int
) -> list[tuple[int, _Hypothesis]]:
    """Return the `count` most probable one-token extensions, best first, with their rows."""
    logprobs_BV = batch.logits_BV.log_softmax(-1)
    sums_BV = logprobs_BV.double() + torch.tensor(
        [h.logprob for h in live], dtype=torch.float64
    ).unsqueeze(1)
    flat = sums_BV.flatten().topk(min(count, sums_BV.numel())).indices
    rows, tokens = flat // sums_BV.shape[1], flat % sums_BV.shape[1]
    return [
        (row, _Hypothesis((*live[row].tokens, token), (*live[row].logprobs, logprob)))
        for row, token, logprob in zip(
            rows.tolist(), tokens.tolist(), logprobs_BV[rows, tokens].tolist(), strict=True
        )
    ]


def _is_settled(
    finished: list[_Hypothesis], best: _Hypothesis, max_tokens: int, beams: BeamSearchConfig
) -> bool:
    """Whether all beams are finished and the best unfinished one cannot displace any of them."""
    if len(finished) < beams.width:
        return False
    worst = finished[-1]
    return beams.score(worst.logprob, len(worst.tokens)) >= beams.score(best.logprob, max_tokens)


def _finish(
    hypothesis: _Hypothesis, tokenizer: Tokenizer, prompt: Sequence[int], stops: tuple[str, ...]
) -> _Hypothesis:
    """Set the finish reason where the last token ends the document or completes a stop string."""
    reason = None
    if hypothesis.tokens[-1] == tokenizer.end_id:
        reason = FinishReason.DOCUMENT
    elif stops and _text(hypothesis, tokenizer, prompt, stops)[1]:
        reason = FinishReason.STOP
    return _Hypothesis(hypothesis.tokens, hypothesis.logprobs, reason)


def _text(
    hypothesis: _Hypothesis, tokenizer: Tokenizer, prompt: Sequence[int], stops: tuple[str, ...]
) -> tuple[str, bool]:
    """Return the text up to a stop string, and whether there was one."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    stop_filter = StopStringFilter(stops)
    parts = [
        stop_filter.add(piece)
        for token in hypothesis.tokens
        for piece in detokenizer.add(token)
        if not stop_filter.matched
    ]
    parts += [stop_filter.add(piece) for piece in detokenizer.flush() if not stop_filter.matched]
    return "".join(parts) + stop_filter.flush(), stop_filter.matched


def _continuation(
    hypothesis: _Hypothesis,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    stops: tuple[str, ...],
    number: int,
    rank: int,
) -> Continuation:
    text, _ = _text(hypothesis, tokenizer, prompt, stops)
    return Continuation(
        number,
        rank,
        list(hypothesis.tokens),
        list(hypothesis.logprobs),
        text,
        hypothesis.finish_reason,
    )
