"""The real lm-evaluation-harness on an export gives the metrics of `nextpt eval --harness`.

An export's tokenizer puts the start token before a text, and the harness puts its prefix token
before that: without add_bos_token=False, it scores a start token after a start token, which never
occurs in training.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from nextpt.evaluate.evaluation import EvaluationProtocol, evaluate_model
from nextpt.evaluate.loaded_model import open_model, open_run
from nextpt.exchange import export_hf
from tests.support.runs import make_run

pytest.importorskip("lm_eval")

TEXTS = ["Whan that Aprille with his shoures soote\n" * n for n in (1, 4, 9)] + [
    "\u00e9\u4f60 def f(x):\n"
]


@pytest.mark.slow
def test_the_harness_measures_the_same_on_an_export(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM

    make_run(tmp_path / "run")
    export_hf(open_run(tmp_path / "run"), tmp_path / "run" / "tokenizer.json", tmp_path / "hf")
    model = HFLM(
        pretrained=str(tmp_path / "hf"),
        device="cpu",
        batch_size=2,
        dtype="float32",
        add_bos_token=False,
    )
    assert model.prefix_token_id == open_model(tmp_path / "run").tokenizer.start_id
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    likelihoods = model.loglikelihood_rolling(requests)
    sizes = [len(text.encode()) for text in TEXTS]
    metrics = evaluate_model(
        open_model(tmp_path / "run"), {"d": TEXTS}, EvaluationProtocol(resamples=10, harness=True)
    )["harness"]["d"]
    assert metrics["bits_per_byte"] == pytest.approx(
        bits_per_byte(list(zip(likelihoods, sizes, strict=True))), rel=1e-6
    )
    assert metrics["byte_perplexity"] == pytest.approx(
        weighted_perplexity(list(zip(likelihoods, sizes, strict=True))), rel=1e-6
    )
    # lm_eval/tasks/wikitext/preprocess_wikitext.py
    words = [len(re.split(r"\s+", text)) for text in TEXTS]
    expected = weighted_perplexity(list(zip(likelihoods, words, strict=True)))
    assert math.log(metrics["word_perplexity"]) == pytest.approx(math.log(expected), rel=1e-6)
