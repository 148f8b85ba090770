"""Memorization: planted overlaps, extraction of trained text, canaries against controls."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.mds import StoredSequence
from data_prep.prepare import prepare
from data_prep.spec import PrepSpec
from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError, DataPrepError
from nextpt.config import Config
from nextpt.data.dataset import open_sequences
from nextpt.evaluate.memorization.canaries import (
    Canary,
    exposure,
    make_canaries,
    read_canaries,
    write_canaries,
)
from nextpt.evaluate.memorization.contamination import find_overlaps, training_texts
from nextpt.evaluate.memorization.examine import examine
from nextpt.evaluate.memorization.extraction import (
    Spans,
    agreement,
    greedy,
    name_documents,
    sample_spans,
    sums_by_document,
)
from nextpt.evaluate.memorization.measure import (
    bits_per_byte_by_contamination,
    measure_canaries,
    measure_extraction,
)
from nextpt.evaluate.memorization.ngrams import CHARACTERS, WORDS, ngram_hashes, units
from nextpt.model import Decoder, build_decoder
from tests.support.datasets import tiny

NUMBERED = [f"w{i}" for i in itertools.islice(itertools.count(), 5000)]


def text_of(start: int, words: int) -> str:
    """`words` words that occur nowhere else."""
    return " ".join(NUMBERED[start : start + words])


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(0, 2**64 - 1), max_size=80), length=st.integers(1, 60))
def test_equal_ngrams_have_equal_hashes(values: list[int], length: int) -> None:
    hashes = ngram_hashes(np.array(values * 2, dtype=np.uint64), length)
    assert len(hashes) == max(2 * len(values) - length + 1, 0)
    for first in range(max(min(len(values), len(hashes) - len(values)), 0)):
        assert hashes[first] == hashes[first + len(values)]
    ngrams = {tuple((values * 2)[i : i + length]) for i in range(len(hashes))}
    assert len(set(hashes.tolist())) == len(ngrams)


def test_units_ignore_case_and_punctuation() -> None:
    assert np.array_equal(units("Don't, STOP_now!").words, units("don t stop now").words)
    assert np.array_equal(units("a b\nc").characters, units("ABC").characters)
    assert len(units("").words) == len(units(" \n_").characters) == 0


def corpus(folder: Path, training: list[str], sequence_length: int, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in training))
    prepare(
        PrepSpec(
            domains={"text": folder / "text.jsonl"},
            output=folder / "shards",
            sequence_length=sequence_length,
            validation_fraction=0.0,
            **more,
        )
    )
    return folder / "shards"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[bool]]:
    """A dataset whose long documents are cut, an evaluation set, and which documents overlap."""
    # 26 words and some 100 characters: detected across any cut
    shared = [text_of(1000 + 30 * i, 26) for i in range(8)]
    training = [
        f"{text_of(40 * i, 40)} {s} {text_of(2000 + 40 * i, 40)}" for i, s in enumerate(shared)
    ]
    evaluated = [f"other{i} begins {s.upper()}, and ends other{i}" for i, s in enumerate(shared)]
    clean = [f"clean{i} " + " ".join(f"c{i}x{j}" for j in range(60)) for i in range(8)] + [
        "short",
        "",
    ]
    data = corpus(tmp_path_factory.mktemp("planted"), training, 128, vocab_size=300)
    return data, evaluated + clean, [True] * len(evaluated) + [False] * len(clean)


@pytest.mark.thorough
def test_every_planted_overlap_is_detected(planted: tuple[Path, list[str], list[bool]]) -> None:
    data, evaluated, expected = planted
    tokenizer = Tokenizer(data / "tokenizer.json")
    # So sequences of 128 tokens cut documents of three of these
    assert max(len(tokenizer.encode(t)) for t in evaluated[:1]) > 64
    overlaps = find_overlaps({"set": evaluated}, training_texts(data, tokenizer))
    assert [f.contaminated for f in overlaps] == expected
    assert all(
        f.shares["words"] > 0 and f.shares["characters"] > 0 for f in overlaps if f.contaminated
    )


@pytest.mark.thorough
def test_the_key_of_the_text_of_an_evaluation_set_is_chosen(
    planted: tuple[Path, list[str], list[bool]], tmp_path: Path
) -> None:
    dataset, texts, overlapping = planted
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))

    def contaminated(text_field: str) -> int:
        result = examine(None, None, dataset, str(path), lambda *_: None, text_field=text_field)
        return result["domains"]["text"]["contaminated"]

    assert contaminated("body") == sum(overlapping)
    with pytest.raises(DataPrepError, match="under key 'text'; its keys are 'body'"):
        contaminated("text")


@pytest.mark.parametrize(("words", "overlaps"), [(WORDS, True), (WORDS - 1, False)])
def test_thirteen_words_and_no_fewer(words: int, overlaps: bool) -> None:
    # One character each: characters alone are no evidence
    shared = " ".join(f"{chr(97 + i)}" for i in range(words))
    (result,) = find_overlaps(
        {"set": [f"before {shared} after"]}, iter([f"earlier {shared} later"])
    )
    assert (result.shares["words"] > 0, result.shares["characters"] > 0) == (overlaps, False)


@pytest.mark.parametrize(("characters", "overlaps"), [(CHARACTERS, True), (CHARACTERS - 1, False)])
def test_fifty_characters_and_no_fewer(characters: int, overlaps: bool) -> None:
    shared = "".join(chr(97 + i % 23) for i in range(characters))
    (result,) = find_overlaps({"set": [f"0 {shared} 1"]}, iter([f"2 {shared} 3"]))
    assert result.shares == {
        "words": 0.0,
        "characters": pytest.approx(1 / (characters + 2 - CHARACTERS + 1)) if overlaps else 0.0,
    }


def test_bits_per_byte_are_ratios_of_sums() -> None:
    ratios = bits_per_byte_by_contamination(
        np.log(2) * np.array([8.0, 2.0, 5.0]), np.array([8, 1, 1]), np.array([False, True, False])
    )
    assert ratios == {
        "all": pytest.approx(1.5),
        "clean": pytest.approx(13 / 9),
        "contaminated": pytest.approx(2.0),
    }
    assert (
        bits_per_byte_by_contamination(np.ones(1), np.ones(1), np.zeros(1, bool))["contaminated"]
        is None
    )


def trained_on(config: Config, tokens: list[list[int]], steps: int) -> Decoder:
    """A decoder that was trained on some sequences."""
    model = build_decoder(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sequences = torch.tensor(tokens)
    for _ in range(steps):
        hidden = model(
            sequences[:, :-1], torch.arange(sequences.shape[1] - 1).expand(len(sequences), -1)
        ).hidden
        loss = torch.nn.functional.cross_entropy(
            model.lm_head(hidden).flatten(0, 1), sequences[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_greedy_is_the_argmax_of_the_forward_pass(tmp_path: Path) -> None:
    config = tiny(tmp_path, tmp_path)
    model = build_decoder(config).eval()
    prefixes = torch.randint(0, 512, (3, 7), generator=torch.Generator().manual_seed(0))
    continuation = greedy(model, prefixes, 9)
    whole = torch.cat([prefixes, continuation], dim=1)
    with torch.no_grad():
        logits = model.lm_head(model(whole[:, :-1], torch.arange(15).expand(3, 15)).hidden)
    assert torch.equal(logits[:, 6:].argmax(-1), continuation)


@pytest.mark.thorough
def test_trained_text_is_extracted_and_other_text_is_not(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    texts = ["".join(chance.choice(list("abcdefgh"), 30)) for _ in range(16)]
    data = corpus(tmp_path / "train", texts[:8], 32, characters=True)
    other = corpus(tmp_path / "other", texts[8:], 32, characters=True)
    tokenizer = Tokenizer(data / "tokenizer.json")
    config = tiny(
        data,
        tmp_path,
        data={"sequence_length": 32},
        model={"vocab_size": tokenizer.vocab_size, "width": 64},
    )
    stored = [
        [tokenizer.start_id, *tokenizer.encode(t).tolist(), tokenizer.end_id] for t in texts[:8]
    ]
    # The span may start anywhere
    model = trained_on(
        config,
        [document[at : at + 24] for document in stored for at in range(len(document) - 23)],
        80,
    )
    sides = {
        "train": open_sequences(data, "train"),
        "validation": open_sequences(other, "train"),
    }
    extraction = measure_extraction(model, sides, prefixes=[16], continuation=8, count=40)
    assert extraction["train"]["sequences"] == 40
    assert (
        extraction["train"]["prefixes"]["16"]["score"]["mean"]
        > 0.6
        > extraction["validation"]["prefixes"]["16"]["score"]["mean"]
    )
    assert (
        extraction["train"]["prefixes"]["16"]["exact"]["low"]
        > extraction["validation"]["prefixes"]["16"]["exact"]["share"]
    )
    assert extraction["gap_nats_per_token"] > 0.5
    with pytest.raises(DataError, match="more than the model's 32 positions"):
        measure_extraction(model, sides, prefixes=[30], continuation=8, count=4)


def test_spans_lie_inside_one_document(planted: tuple[Path, list[str], list[bool]]) -> None:
    sequences = list(open_sequences(planted[0], "train").values())
    tokenizer = Tokenizer(planted[0] / "tokenizer.json")
    spans = sample_spans(sequences, [50], 20, 5, np.random.default_rng(1))
    assert spans.tokens.shape == (50, 20)
    assert not np.isin(spans.tokens[:, 1:-1], [tokenizer.start_id, tokenizer.end_id]).any()
    assert np.array_equal(
        spans.tokens, sample_spans(sequences, [50], 20, 5, np.random.default_rng(1)).tokens
    )
    assert sample_spans(sequences, [3], 500, 5, np.random.default_rng(1)).tokens.shape == (0, 500)


class Stored:
    """Sequences of a domain, all tokens of each one document of its own."""

    def __init__(self, token: int, sequences: int, first: int = 0) -> None:
        self.token, self.sequences, self.first = token, sequences, first

    def __len__(self) -> int:
        return self.sequences

    def __getitem__(self, index: int) -> StoredSequence:
        tokens = np.full(33, self.token, np.uint16)
        tokens[1::2] = 2 + (self.first + index) % 100
        return StoredSequence(tokens, np.array([33], np.uint32), np.zeros(1, np.uint8), 0)

    def prepare(self, shards: Iterable[int]) -> None:
        pass


def test_the_gap_compares_equal_shares_of_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The domains differ by 3 nats, the splits by 0.14; their shares differ between the splits."""
    generator = np.random.default_rng(0)

    def nats(model: Any, spans: Spans) -> np.ndarray:
        level = np.where(spans.domains == 0, 1.0, 4.0)
        held_out = np.maximum(spans.tokens[:, 0], spans.tokens[:, 1]) >= 52
        noise = generator.normal(0, 0.05, len(level))
        return np.asarray(level + 0.14 * held_out + noise)

    monkeypatch.setattr("nextpt.evaluate.memorization.measure.continuation_nats", nats)
    monkeypatch.setattr(
        "nextpt.evaluate.memorization.measure.agreement",
        lambda model, spans, prefix: np.zeros(len(spans.tokens)),
    )
    splits = {
        "train": {"code": Stored(0, 40), "prose": Stored(1, 10)},
        "validation": {"code": Stored(0, 5, first=50), "prose": Stored(1, 20, first=50)},
    }
    for seed in range(6):
        measured = measure_extraction(
            SimpleNamespace(max_position=64),  # type: ignore[arg-type]
            splits,
            prefixes=[8],
            continuation=8,
            count=200,
            seed=seed,
        )
        low, high = measured["gap_interval"]
        assert measured["gap_nats_per_token"] == pytest.approx(0.14, abs=0.03)
        assert low - 0.01 < 0.14 < high + 0.01 and high - low < 0.15
        assert measured["gap_by_domain"]["code"]["share"] == pytest.approx(0.8)
        assert measured["validation"]["documents"] <= 25


def test_spans_are_named_by_the_document_that_holds_them() -> None:
    sequences = Stored(0, 6)
    spans = sample_spans([sequences], [30], 10, 4, np.random.default_rng(0))
    documents = [
        np.concatenate([sequences[2 * i].tokens, sequences[2 * i + 1].tokens]) for i in range(2)
    ]
    named = name_documents(spans, [documents])
    pieces = spans.tokens[:, 0] + spans.tokens[:, 1] - 2
    assert np.array_equal(named.documents[pieces < 4], pieces[pieces < 4] // 2)
    # Of no document that is known: the piece stays
    assert (named.documents[pieces >= 4] >= len(documents)).all()
    values = pieces.astype(float)
    assert sums_by_document(values, named, 0)[:2, 0] == pytest.approx(
        [values[pieces < 2].sum(), values[(pieces >= 2) & (pieces < 4)].sum()]
    )


@pytest.mark.thorough
def test_canaries_are_distinguished_from_controls(tmp_path: Path) -> None:
    canaries = make_canaries(per_repeats=2, controls=20, seed=3)
    assert (
        canaries
        == make_canaries(per_repeats=2, controls=20, seed=3)
        != make_canaries(per_repeats=2, controls=20, seed=4)
    )
    write_canaries(canaries, tmp_path)
    assert read_canaries(tmp_path) == canaries
    lines = [
        json.loads(line)["text"] for line in (tmp_path / "canaries.jsonl").read_text().splitlines()
    ]
    assert {c.text: lines.count(c.text) for c in canaries} == {c.text: c.repeats for c in canaries}
    tokenizer = Tokenizer(
        corpus(tmp_path / "data", [c.text for c in canaries], 128, characters=True)
        / "tokenizer.json"
    )
    config = tiny(
        tmp_path,
        tmp_path,
        data={"sequence_length": 192},
        model={"vocab_size": tokenizer.vocab_size, "width": 64},
    )
    taught = [c for c in canaries if c.repeats == 128]
    model = trained_on(
        config, [[tokenizer.start_id, *tokenizer.encode(c.text).tolist()[:80]] for c in taught], 150
    )
    short = [Canary(c.text[:80], c.repeats) for c in canaries if c.repeats in (0, 128)]
    measured = measure_canaries(model, tokenizer, short)
    assert measured["128"]["extracted"]["share"] == 1 and measured["0"]["extracted"]["share"] == 0
    assert measured["128"]["exposure_bits"]["mean"] == pytest.approx(np.log2(21))
    assert 0 <= measured["0"]["exposure_bits"]["mean"] < 3
    scored = agreement(model, sample_spans([], [], 4, 2, np.random.default_rng(0)), 2)
    assert scored.shape == (0,)


def test_exposure() -> None:
    assert exposure(1.0, [2.0, 3.0, 4.0]) == 2 and exposure(9.0, [2.0, 3.0, 4.0]) == 0
    assert exposure(2.5, [2.0, 3.0, 4.0]) == pytest.approx(1)


@pytest.mark.parametrize("content", ["", "[]", '[{"text": "a"}]', '[{"text": "a", "repeats": 1}]'])
def test_a_damaged_list_of_canaries_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "canaries.json").write_text(content)
    with pytest.raises(DataError, match=r"canaries\.json"):
        read_canaries(tmp_path)


@pytest.mark.thorough
def test_contamination_without_a_run_names_no_weights(dataset: Path) -> None:
    result = examine(None, None, dataset, None, lambda name, share: None)
    assert result["run"] is result["step"] is result["weights"] is None
    assert all("bits_per_byte" not in domain for domain in result["domains"].values())
