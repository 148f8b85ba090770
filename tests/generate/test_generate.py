"""Generated tokens are the model's on the whole text, in any batch; beam search; prompt files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import UserError
from nextpt.generate import (
    BeamSearchConfig,
    Continuation,
    FinishReason,
    GenerationConfig,
    Sampling,
    beam,
    beam_search,
    generate,
    prompt_tokens,
)
from nextpt.generate.decoding import DecodingBatch
from nextpt.generate.prompts import read_prompts
from nextpt.model import Decoder
from tests.support.models import POSITIONS, decoder, our_logits
from tests.support.tokenizers import KINDS

PROMPTS = [
    "The quick",
    "",
    "def f(x):\n    if x",
    "a",
    "Na\u00efve caf\u00e9s",
    "12345 o'clock",
    "words other",
    "It's",
]
Setup = tuple[Decoder, Tokenizer]


@pytest.fixture(scope="module", params=[{}, {"sliding_window": 5}], ids=["whole", "window"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    KINDS["byte_level"](path)
    tokenizer = Tokenizer(path)
    _, model = decoder(vocab_size=tokenizer.vocab_size, **request.param)
    return model, tokenizer


def run(setup: Setup, prompts: list[str], **config: Any) -> list[Continuation]:
    tokens = [prompt_tokens(*setup, prompt) for prompt in prompts]
    return list(generate(*setup, tokens, GenerationConfig(**{"max_tokens": 12} | config)))


def training_logprobs(setup: Setup, prompt: str, continuation: Continuation) -> torch.Tensor:
    """Log-probabilities of a continuation by one training pass over the whole text."""
    model, tokenizer = setup
    text = torch.tensor(
        [tokenizer.start_id, *tokenizer.encode(prompt).tolist(), *continuation.tokens]
    )
    with torch.no_grad():
        hidden = model(text[None, :-1], torch.arange(len(text) - 1)[None]).hidden[0]
        nats = model.lm_head(hidden, text[1:], torch.ones(len(text) - 1), 1.0).nats
    return -nats[-len(continuation.tokens) :]


@pytest.mark.thorough
@pytest.mark.parametrize("batch_size", [1, 8, 3])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0), Sampling(seed=3, top_p=0.9, repetition_penalty=1.2)],
    ids=["greedy", "drawn"],
)
def test_log_probabilities_are_those_of_training(
    setup: Setup, batch_size: int, sampling: Sampling
) -> None:
    """Alone, and left-padded in a batch of prompts that end at other lengths."""
    continuations = run(setup, PROMPTS, batch_size=batch_size, sampling=sampling)
    assert [c.prompt for c in continuations] == list(range(8))
    for prompt, c in zip(PROMPTS, continuations, strict=True):
        torch.testing.assert_close(
            torch.tensor(c.logprobs), training_logprobs(setup, prompt, c), atol=1e-4, rtol=0
        )


@pytest.mark.thorough
def test_the_batch_does_not_matter(setup: Setup) -> None:
    for sampling in (Sampling(temperature=0), Sampling(seed=1)):
        alone, together, padded = (
            run(setup, PROMPTS, batch_size=size, sampling=sampling, samples=2)
            for size in (1, 16, 5)
        )
        assert (
            [c.tokens for c in alone] == [c.tokens for c in together] == [c.tokens for c in padded]
        )
        assert [c.text for c in alone] == [c.text for c in together]


def test_greedy_is_the_arg_max_of_the_whole_text(setup: Setup) -> None:
    [continuation] = run(setup, ["The"], sampling=Sampling(temperature=0))
    text = [setup[1].start_id, *setup[1].encode("The").tolist()]
    for token in continuation.tokens:
        assert token == int(our_logits(setup[0], torch.tensor([text]))[0, -1].argmax())
        text.append(token)


def test_seeds_repeat_bit_for_bit(setup: Setup) -> None:
    first, repeated, other = (
        run(setup, ["The", "a"], samples=3, sampling=Sampling(seed=seed)) for seed in (3, 3, 4)
    )
    assert first == repeated and [c.tokens for c in first] != [c.tokens for c in other]
    assert len({tuple(c.tokens) for c in first}) == 6  # samples have continuation_rng of their own


def test_ends_at_the_end_of_the_document_and_of_the_positions(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup[1], "end_id", -1)  # never
    [whole] = run(setup, ["The"], sampling=Sampling(seed=3), max_tokens=1000)
    room = POSITIONS - 1 - len(setup[1].encode("The"))
    assert len(whole.tokens) == room and whole.finish_reason is FinishReason.CONTEXT
    assert (
        run(setup, ["The"], sampling=Sampling(seed=3), max_tokens=room)[0].finish_reason
        is FinishReason.LENGTH
    )
    monkeypatch.setattr(setup[1], "end_id", whole.tokens[5])
    [ended] = run(setup, ["The"], sampling=Sampling(seed=3), max_tokens=1000)
    stop = whole.tokens.index(whole.tokens[5]) + 1
    assert ended.tokens == whole.tokens[:stop] and ended.finish_reason is FinishReason.DOCUMENT
    assert ended.text == setup[1].decode([*setup[1].encode("The"), *whole.tokens[: stop - 1]])[3:]


def test_each_row_reaches_the_end_of_its_own_positions(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a long prompt a short one uses more columns than the model has positions."""
    monkeypatch.setattr(setup[1], "end_id", -1)
    prompts = ["", "def f(x):\n    if x > 10:\n        return x", "a"]
    continuations = run(setup, prompts, sampling=Sampling(seed=2), max_tokens=1000)
    for prompt, c in zip(prompts, continuations, strict=True):
        assert (
            len(c.tokens) == POSITIONS - 1 - len(setup[1].encode(prompt))
            and c.finish_reason is FinishReason.CONTEXT
        )
        torch.testing.assert_close(
            torch.tensor(c.logprobs), training_logprobs(setup, prompt, c), atol=1e-4, rtol=0
        )
    assert len(continuations[0].tokens) - len(continuations[1].tokens) > 5


def test_a_prompt_without_room_is_refused(setup: Setup) -> None:
    with pytest.raises(UserError, match=f"line 7 has .* positions end at {POSITIONS}: shorten it"):
        prompt_tokens(*setup, "word " * 200, "line 7")


def test_stop_strings_across_tokens(setup: Setup) -> None:
    """The stop string is part of the continuation and begins and ends inside tokens."""
    pieces: list[str] = []
    [whole] = run(setup, ["The"], sampling=Sampling(seed=8), max_tokens=30)
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 5]
    tokens = [prompt_tokens(*setup, "The")]
    config = GenerationConfig(Sampling(seed=8), max_tokens=30, stop=("nowhere to be found", stop))
    [continuation] = generate(
        *setup, tokens, config, lambda prompt, sample, piece: pieces.append(piece)
    )
    assert continuation.finish_reason is FinishReason.STOP and continuation.text == whole.text[
        : whole.text.index(stop)
    ] == "".join(pieces)
    assert (
        continuation.tokens == whole.tokens[: len(continuation.tokens)]
        and len(continuation.tokens) < 30
    )
    [begun] = generate(
        *setup,
        tokens,
        GenerationConfig(Sampling(seed=8), max_tokens=30, stop=(whole.text[-1] + "and more",)),
    )
    assert begun.text == whole.text, "what was held back and became no stop string is lost"


def exhaustive(
    setup: Setup, prompt: list[int], length: int, beams: BeamSearchConfig
) -> list[tuple[float, tuple[int, ...]]]:
    """(score, tokens) of every continuation, best first, each scored over the whole text."""
    model, tokenizer = setup
    vocabulary = model.lm_head.weight.shape[0]
    candidates = []
    for tokens in itertools.product(range(vocabulary), repeat=length):
        stop = tokens.index(tokenizer.end_id) + 1 if tokenizer.end_id in tokens else length
        if any(tokens[stop:]):  # each hypothesis once
            continue
        logprobs = our_logits(model, torch.tensor([[*prompt, *tokens[:stop]]]))[0].log_softmax(-1)
        total = sum(float(logprobs[len(prompt) - 1 + i, t]) for i, t in enumerate(tokens[:stop]))
        candidates.append((beams.score(total, stop), tokens[:stop]))
    return sorted(candidates, reverse=True)


@pytest.mark.thorough
@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_wide_beams_find_the_best_of_all(
    setup: Setup, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = decoder(vocab_size=6)
    small = (model, setup[1])
    monkeypatch.setattr(setup[1], "end_id", 4)
    beams = BeamSearchConfig(300, alpha)
    continuations = beam_search(*small, [1, 2], GenerationConfig(max_tokens=3, samples=20), beams)
    expected = exhaustive(small, [1, 2], 3, beams)[:20]
    assert [tuple(c.tokens) for c in continuations] == [tokens for _, tokens in expected]
    assert [beams.score(sum(c.logprobs), len(c.tokens)) for c in continuations] == pytest.approx(
        [score for score, _ in expected], abs=1e-5
    )
    assert {c.finish_reason for c in continuations} == {FinishReason.DOCUMENT, FinishReason.LENGTH}


@pytest.mark.thorough
@pytest.mark.parametrize("width", [1, 2, 4])
def test_ending_a_search_early_loses_nothing(
    setup: Setup, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = decoder(vocab_size=6)
    monkeypatch.setattr(setup[1], "end_id", 4)
    arguments = [
        (
            [first, second],
            GenerationConfig(max_tokens=12, samples=width),
            BeamSearchConfig(width, alpha),
        )
        for first in range(6)
        for second in (1, 5)
        for alpha in (0.0, 0.6, 2.0)
    ]
    steps: list[Any] = []
    feed = DecodingBatch.append
    monkeypatch.setattr(
        DecodingBatch, "append", lambda self, tokens: (steps.append(0), feed(self, tokens))
    )
    early = [beam_search(model, setup[1], *a) for a in arguments]
    fewer = len(steps)
    monkeypatch.setattr(beam, "_is_settled", lambda *arguments: False)
    assert early == [beam_search(model, setup[1], *a) for a in arguments]
    assert fewer < 0.9 * (len(steps) - fewer), "no search ended early"


def test_one_beam_is_greedy_and_more_are_no_worse(setup: Setup) -> None:
    tokens = prompt_tokens(*setup, "The")
    [greedy] = run(setup, ["The"], sampling=Sampling(temperature=0))
    [beam] = beam_search(*setup, tokens, GenerationConfig(max_tokens=12), BeamSearchConfig(1))
    assert beam.tokens == greedy.tokens and beam.text == greedy.text
    torch.testing.assert_close(
        torch.tensor(beam.logprobs), training_logprobs(setup, "The", beam), atol=1e-4, rtol=0
    )
    beams = beam_search(
        *setup, tokens, GenerationConfig(max_tokens=12, samples=3), BeamSearchConfig(6)
    )
    scores = [BeamSearchConfig(6).score(sum(c.logprobs), len(c.tokens)) for c in beams]
    assert scores == sorted(scores, reverse=True) and scores[0] >= BeamSearchConfig(1).score(
        sum(beam.logprobs), len(beam.tokens)
    )
    stop = beams[0].text[2:4]
    stopped = beam_search(
        *setup,
        tokens,
        GenerationConfig(max_tokens=12, samples=6, stop=(stop,)),
        BeamSearchConfig(6),
    )
    assert FinishReason.STOP in {c.finish_reason for c in stopped} and not any(
        stop in c.text for c in stopped
    )
    with pytest.raises(UserError, match="samples = 7 of beams = 6"):
        beam_search(*setup, tokens, GenerationConfig(samples=7), BeamSearchConfig(6))


def test_selected_cache_rows_continue_as_their_own_texts(setup: Setup) -> None:
    """The same row may be selected twice, as by beams."""
    model, _ = setup
    decoding = DecodingBatch(model, [[1, 2, 3, 4], [5], [6, 7]], 8)
    decoding.append(torch.tensor([8, 9, 10]))
    decoding.take([2, 1, 2])
    decoding.append(torch.tensor([11, 12, 13]))
    for row, text in enumerate(([6, 7, 10, 11], [5, 9, 12], [6, 7, 10, 13])):
        torch.testing.assert_close(
            decoding.logits_BV[row],
            our_logits(model, torch.tensor([text]))[0, -1],
            atol=1e-5,
            rtol=1e-4,
        )


@pytest.mark.parametrize(
    "bad", [{"max_tokens": 0}, {"samples": 0}, {"batch_size": 0}, {"stop": ("a", "")}]
)
def test_bad_generation_configs_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        GenerationConfig(**bad)


def test_prompts_of_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"one\n\nthree \r\n")
    assert read_prompts(tmp_path / "p.txt") == {
        f"{tmp_path}/p.txt, line {n}": t for n, t in ((1, "one"), (2, ""), (3, "three "))
    }
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb", "id": 3}\n\n{"prompt": ""}\n')
    assert list(read_prompts(tmp_path / "p.jsonl").values()) == ["a\nb", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"a", "are read from .jsonl"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt', "line 2 is not JSON"),
        ("p.jsonl", b'{"text": "a"}', 'line 1 is not an object with a text under "prompt"'),
        ("p.jsonl", b"[]", "line 1 is not an object"),
        ("p.txt", b"", "is empty"),
        ("p.txt", b"ab\xff", "not UTF-8: invalid start byte at byte 2"),
        ("none.txt", None, "No such file"),
    ],
)
def test_bad_files_of_prompts_are_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
