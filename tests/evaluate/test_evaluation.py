"""Evaluation: same metrics for any batch size and rank count, intervals, bands, harness metrics."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError
from nextpt.data.sequences import load_manifest
from nextpt.evaluate.bootstrap import ratio_interval, resampled_sums
from nextpt.evaluate.documents import context_lengths, sliding_windows
from nextpt.evaluate.evaluation import EvaluationProtocol, evaluate_model
from nextpt.evaluate.frequency import band_of_tokens, training_counts
from nextpt.evaluate.loaded_model import LoadedModel, open_model
from nextpt.evaluate.texts import encode_document, text_files
from nextpt.observe.evaluation_plot import plot_evaluation
from tests.support.runs import make_run

TEXTS = {
    "verse": ["Whan that Aprille with his shoures soote\n" * n for n in (1, 4, 9)],
    "code": ["def f(x):\n    return x + 1\n" * n for n in (2, 7)] + ["\u00e9\u4f60 \n"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    make_run(folder)
    return open_model(folder)


@pytest.fixture(scope="module")
def result(source: LoadedModel) -> dict:
    return evaluate_model(source, TEXTS, EvaluationProtocol(resamples=200, harness=True))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "protocol",
    [
        EvaluationProtocol(batch_size=1, resamples=200),
        EvaluationProtocol(batch_size=7, resamples=200),
        pytest.param(EvaluationProtocol(ranks=2, resamples=200), marks=pytest.mark.slow),
        pytest.param(
            EvaluationProtocol(ranks=3, batch_size=5, resamples=200), marks=pytest.mark.slow
        ),
    ],
    ids=lambda p: f"batch_size={p.batch_size},ranks={p.ranks}",
)
def test_any_batch_size_and_rank_count_give_the_same(
    source: LoadedModel, result: dict, protocol: EvaluationProtocol
) -> None:
    repeated = evaluate_model(source, TEXTS, protocol)
    for a, b in (
        (result["total"], repeated["total"]),
        *((result["domains"][d], repeated["domains"][d]) for d in TEXTS),
    ):
        assert (a["tokens"], a["bytes"]) == (b["tokens"], b["bytes"])
        for key in ("nats_per_token", "bpb", "bpb_with_eod", "perplexity"):
            assert b[key] == pytest.approx(a[key], rel=1e-6)
        assert b["intervals"]["bpb"] == pytest.approx(a["intervals"]["bpb"], rel=1e-6)


def test_contexts_and_bands_divide_all_text_tokens(result: dict) -> None:
    total = result["total"]
    for rows in (result["by_context"], result["by_frequency"]["bands"]):
        assert sum(row["tokens"] for row in rows) == total["tokens"]
        assert sum(row["tokens"] * row["nats_per_token"] for row in rows) == pytest.approx(
            total["nats_per_token"] * total["tokens"]
        )
    assert (
        result["by_context"][0]["from"] == 1 and result["by_context"][-1]["to"] == result["window"]
    )
    assert result["by_frequency"]["counted_in"] == "evaluated text"


def test_contexts_of_document_starts_are_apart(source: LoadedModel, result: dict) -> None:
    """Below window - stride tokens of context only starts of documents were scored."""
    window, stride = result["window"], result["stride"]
    starts = [row for row in result["by_context"] if row["document_start"]]
    later = [row for row in result["by_context"] if not row["document_start"]]
    is_text = source.tokenizer.token_bytes() > 0
    documents = [
        encode_document(source.tokenizer, text)[0] for texts in TEXTS.values() for text in texts
    ]
    assert sum(row["tokens"] for row in starts) == sum(
        int(is_text[document[1 : window + 1]].sum()) for document in documents
    )
    assert later and all(row["to"] > window - stride for row in later)


@pytest.mark.parametrize("name", ["window", "stride"])
def test_sizes_of_zero_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} = 0 must be between"):
        EvaluationProtocol(**{name: 0}).sizes(64)


def test_legends_of_the_plot_cover_no_curve(result: dict, monkeypatch: Any, tmp_path: Path) -> None:
    figures = []
    monkeypatch.setattr(
        "nextpt.observe.evaluation_plot.save_plot", lambda figure, _: figures.append(figure)
    )
    plot_evaluation(result, tmp_path / "plot.png")
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    legends = [axes for axes in figure.axes if axes.get_legend()]
    assert len(legends) == 2
    for axes in legends:
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())


def test_totals_are_ratios_of_sums_and_lie_in_their_intervals(result: dict) -> None:
    domains, total = result["domains"].values(), result["total"]
    bits = sum(f["bpb"] * f["bytes"] for f in domains)
    assert total["bpb"] == pytest.approx(bits / sum(f["bytes"] for f in domains))
    for figures in (*domains, total):
        for key, (low, high) in figures["intervals"].items():
            assert low <= figures[key] <= high
    assert {"start_token", "end_token", "documents", "window", "stride"} <= result[
        "protocol"
    ].keys()


def test_contexts_count_what_the_window_shows() -> None:
    assert context_lengths(10, list(sliding_windows([10], 4, 2))).tolist() == [
        1,
        2,
        3,
        4,
        3,
        4,
        3,
        4,
        3,
    ]


def test_the_bootstrap_has_the_error_of_the_mean() -> None:
    """Of documents of one size, the resampled ratio spreads as the mean does: sd / sqrt(n)."""
    rng = np.random.default_rng(0)
    values = rng.normal(5.0, 1.0, 400)
    drawn = resampled_sums(np.stack([values, np.ones(400)], axis=1), 4000, rng)
    low, high = ratio_interval(drawn[:, 0], drawn[:, 1])
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    assert (
        ratio_interval(np.ones(5), np.ones(5)) is None
        and ratio_interval(np.ones(5), np.zeros(5)) is None
    )


def test_bands_follow_the_share_of_a_token() -> None:
    counts = np.array([0, 1, 9, 90, 900, 99_000, 900_000])
    assert band_of_tokens(counts).tolist() == [0, 1, 1, 2, 3, 5, 5]


def test_counts_of_training_shards(dataset: Path) -> None:
    tokenizer = Tokenizer(dataset / "tokenizer.json")
    counts = training_counts(dataset, tokenizer)
    training = load_manifest(dataset).splits["train"].values()
    assert counts[tokenizer.end_id] >= sum(c.documents for c in training) > 0
    assert int(counts.sum()) >= sum(c.tokens for c in training)
    assert training_counts(dataset / "nowhere", tokenizer) is None


def harness_by_its_definition(source: LoadedModel, text: str) -> float:
    """Log-likelihood by lm_eval 0.4's rolling windows with context_len 1, a pass for each."""
    tokens, length = source.tokenizer.encode(text).tolist(), source.model.max_position
    first = min(length, len(tokens))
    pairs = [([source.tokenizer.start_id, *tokens[: first - 1]], tokens[:first])]
    predicted = first
    while predicted < len(tokens):
        count = min(len(tokens) - predicted, length)
        end = predicted + count
        pairs.append((tokens[end - length - 1 : end - 1], tokens[end - count : end]))
        predicted = end
    total = 0.0
    for inputs, targets in pairs:
        ids = torch.tensor([inputs])
        with torch.no_grad():
            logits = source.model.lm_head(
                source.model(ids, torch.arange(len(inputs)).unsqueeze(0)).hidden
            )[0].double()
        total += float(
            logits.log_softmax(-1)[-len(targets) :]
            .gather(1, torch.tensor(targets).unsqueeze(1))
            .sum()
        )
    return total


def test_the_metrics_of_lm_evaluation_harness(source: LoadedModel, result: dict) -> None:
    for domain, texts in TEXTS.items():
        likelihood = sum(harness_by_its_definition(source, text) for text in texts)
        words = sum(len(re.split(r"\s+", text)) for text in texts)
        size = sum(len(text.encode("utf-8")) for text in texts)
        metrics = result["harness"][domain]
        # An exponential of a large number
        assert metrics["word_perplexity"] == pytest.approx(math.exp(-likelihood / words), rel=1e-4)
        assert math.log(metrics["word_perplexity"]) == pytest.approx(-likelihood / words, rel=1e-6)
        assert metrics["byte_perplexity"] == pytest.approx(math.exp(-likelihood / size), rel=1e-6)
        assert metrics["bits_per_byte"] == pytest.approx(-likelihood / size / math.log(2), rel=1e-6)


def test_records_are_scored_and_not_their_syntax(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": ""}\n{"body": "y"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf{}\r\n")
    assert text_files([tmp_path / "a.jsonl", tmp_path / "b.txt"], "body") == {
        "a.jsonl": ["x", "y"],
        "b.txt": ["{}\r\n"],
    }
    with pytest.raises(DataError, match="under key 'text'; its keys are 'body'"):
        text_files([tmp_path / "a.jsonl"])


def test_texts_that_cannot_be_scored(source: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes("caf\u00e9".encode("latin-1"))
    for name, message in (
        ("empty", "is empty"),
        ("latin", "is no UTF-8 text: byte 3 is 0xe9"),
        ("absent", "cannot be read: No such file"),
    ):
        with pytest.raises(DataError, match=message):
            text_files([tmp_path / name])
    with pytest.raises(DataError, match="all documents of d are empty"):
        evaluate_model(source, {"d": ["", ""]}, EvaluationProtocol())
    with pytest.raises(DataError, match="stride = 99 must be between 1 and the window"):
        evaluate_model(source, {"d": ["a"]}, EvaluationProtocol(stride=99))
    single = evaluate_model(
        source, {"d": ["a text far longer than the context " * 30]}, EvaluationProtocol()
    )
    assert (
        single["total"]["intervals"]["bpb"] is None
        and single["total"]["tokens"] > source.model.max_position
    )
