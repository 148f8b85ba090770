"""Metrics are ratios of sums; sliding windows score every token once, by the model itself."""

from __future__ import annotations

import bz2
import lzma
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextpt.evaluate.compressors import compare
from nextpt.evaluate.documents import score_documents, sliding_windows
from nextpt.evaluate.evaluation import EvaluationProtocol, evaluate_model
from nextpt.evaluate.loaded_model import LoadedModel
from nextpt.evaluate.metrics import DomainSums, Metrics, metrics_json
from nextpt.model import build_decoder
from tests.support.datasets import tiny
from tests.support.runs import make_run


@pytest.mark.thorough
@given(st.lists(st.integers(2, 60), min_size=1, max_size=5), st.integers(1, 20), st.data())
def test_windows_score_each_target_once(
    lengths: list[int], window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    scored: dict[int, list[int]] = {d: [] for d in range(len(lengths))}
    for w in sliding_windows(lengths, window, stride):
        assert w.stop - w.start <= window
        scored[w.document] += range(w.start + w.first_scored, w.stop)
    assert scored == {d: list(range(n - 1)) for d, n in enumerate(lengths)}


def test_scores_are_the_models_log_probabilities() -> None:
    config = tiny(Path("none"), Path("none"), data={"sequence_length": 16})
    model = build_decoder(config).eval()
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 500, size) for size in (5, 12, 16)]
    is_text = (np.arange(512) % 7 > 0).astype(np.uint16)
    sizes = [rng.integers(0, 6, len(d) - 1) for d in documents]  # of the position, not of the token
    metrics, nats = score_documents(
        model, documents, sizes, is_text, window=16, stride=8, batch_size=2
    )
    expected, size, count = [], 0, 0
    for d, of_document in zip(documents, sizes, strict=True):
        inputs = torch.from_numpy(d[:-1]).unsqueeze(0)
        with torch.no_grad():
            logits = model.lm_head(model(inputs, torch.arange(len(d) - 1).unsqueeze(0)).hidden)[0]
        losses = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(d[1:]), reduction="none"
        )
        text = torch.from_numpy(is_text[d[1:]] > 0)
        expected.append(float(losses[text].sum()))
        size, count = size + int(of_document.sum()), count + int(text.sum())
    assert nats == pytest.approx(expected, rel=1e-5)
    assert (metrics.tokens, metrics.bytes) == (count, size) and metrics.nats == pytest.approx(
        sum(expected), rel=1e-5
    )


def test_long_documents_get_context_from_the_stride() -> None:
    model = build_decoder(tiny(Path("none"), Path("none"), data={"sequence_length": 16})).eval()
    document = [np.random.default_rng(1).integers(0, 500, 90)]
    sizes, is_text = [np.ones(89, dtype=np.uint32)], np.ones(512, dtype=np.uint16)
    few, _ = score_documents(model, document, sizes, is_text, window=16, stride=16)
    many, _ = score_documents(model, document, sizes, is_text, window=16, stride=4)
    assert few.tokens == many.tokens == 89 and few.nats != many.nats


def test_metrics_derive_from_sums() -> None:
    metrics = Metrics(tokens=4, bytes=10, nats=4 * math.log(3), special_nats=math.log(3)).as_dict()
    assert metrics["nats_per_token"] == pytest.approx(math.log(3))
    assert metrics["perplexity"] == pytest.approx(3)
    assert metrics["bits_per_token"] == pytest.approx(math.log2(3))
    assert metrics["bpb"] == pytest.approx(0.4 * math.log2(3))
    assert metrics["bpb_with_eod"] == pytest.approx(0.5 * math.log2(3))


def test_sums_count_text_only_and_keep_domains_apart() -> None:
    sums = DomainSums(["a", "b", "empty"], torch.device("cpu"))
    nats = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    target_bytes = torch.tensor([[3, 0, 1], [2, 2, 0]])
    is_text = torch.tensor([[True, False, True], [True, True, False]])
    sums.add(nats, target_bytes, is_text, torch.tensor([1, 0]))
    sums.add(nats, target_bytes, is_text, torch.tensor([0, 0]))
    metrics = sums.by_domain()
    assert metrics == {"a": Metrics(6, 12, 53.0, 66.0), "b": Metrics(2, 4, 5.0, 2.0)}
    assert set(metrics_json(sums)["domains"]) == {"a", "b"} and sums.total() == Metrics(
        8, 16, 58.0, 68.0
    )


def test_text_of_no_bytes_counts_and_bytes_of_an_end_do_too() -> None:
    """A tokenizer that changes text.

    The second token stands for no bytes, the third for the end and two stripped spaces.
    """
    sums = DomainSums(["a"], torch.device("cpu"))
    sums.add(
        torch.tensor([[1.0, 2.0, 4.0]]),
        torch.tensor([[3, 0, 2]]),
        torch.tensor([[True, True, False]]),
        torch.tensor([0]),
    )
    assert sums.by_domain() == {"a": Metrics(2, 5, 3.0, 4.0)}


def test_compressors_are_measured_on_the_same_bytes() -> None:
    documents = [b"abc" * 100, b"xyz" * 50]
    joined = b"".join(documents)
    sizes = compare(documents)
    assert sizes["zlib -9"]["bpb_concatenated"] == 8 * len(zlib.compress(joined, 9)) / 450
    assert (
        sizes["bz2 -9"]["bpb_documents"]
        == 8 * sum(len(bz2.compress(d, 9)) for d in documents) / 450
    )
    assert (
        sizes["xz -9e"]["bpb_concatenated"]
        == 8 * len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)) / 450
    )


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["wordpiece", "llama", "byte_level"])
def test_all_bytes_of_held_out_documents_count(tmp_path: Path, kind: str) -> None:
    """For any tokenization of a text, including none."""
    _, model, tokenizer = make_run(tmp_path / "run", kind)
    texts = ["The quick \u00c9l\u00e8ve \u4f60\u597d  \U0001f600\n" * 5, " \n ", "a"]
    total = evaluate_model(
        LoadedModel(tmp_path, model.eval(), tokenizer, 3),
        {"d": texts},
        EvaluationProtocol(stride=4, resamples=10),
    )["total"]
    assert total["bytes"] == sum(len(text.encode()) for text in texts)
    assert (
        total["tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
        and total["nats_per_token"] > 0
    )
    assert total["bpb_with_eod"] > total["bpb"]
