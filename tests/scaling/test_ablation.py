"""Ablations: paired differences, intervals, checks of the file, kept scores, and the plot."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from nextpt.base.errors import ScalingError, UserError
from nextpt.evaluate.bootstrap import ratio_interval, stratified
from nextpt.evaluate.evaluation import BYTES, NATS, EvaluationProtocol, evaluate_model
from nextpt.evaluate.loaded_model import open_model
from nextpt.scaling.ablation import load_ablation
from nextpt.scaling.ablation_plot import plot_ablation
from nextpt.scaling.ablation_result import SUMS, ValidationDocuments, score_run
from nextpt.scaling.paired import paired_metrics
from tests.support.runs import make_run

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {"code": 40, "prose": 25}
TEXTS = {
    "code": ["def f(x):\n    return x + 1\n" * n for n in (2, 7, 3)],
    "verse": ["Whan that Aprille with his shoures soote\n" * 3],
}


def scores(models: int = 3, seeds: int = 2) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Documents that differ widely, models that differ little."""
    rng = np.random.default_rng(0)
    sizes = {d: rng.integers(100, 10_000, n) for d, n in DOCUMENTS.items()}
    nats = {
        d: (
            s
            * np.exp(0.3 * rng.standard_normal(len(s)))
            * (1 + 0.01 * rng.standard_normal((models, seeds, len(s))))
        )
        for d, s in sizes.items()
    }
    return sizes, nats


def test_differences_are_those_of_the_figures() -> None:
    sizes, nats = scores()
    baseline, *variants = paired_metrics(sizes, nats, 300, 0)
    whole = (
        {**nats, "total": np.concatenate(list(nats.values()), axis=2)},
        {
            **sizes,
            "total": np.concatenate(list(sizes.values())),
        },
    )
    for domain in (*DOCUMENTS, "total"):
        bits = whole[0][domain].sum(axis=2) / (math.log(2) * whole[1][domain].sum())
        of = [(m["domains"] | {"total": m["total"]})[domain] for m in (baseline, *variants)]
        assert [f["bpb"] for f in of] == pytest.approx(bits.mean(axis=1).tolist())
        for number, figures in enumerate(of[1:], 1):
            assert figures["difference"] == pytest.approx(figures["bpb"] - of[0]["bpb"])
            assert figures["by_seed"] == pytest.approx((bits[number] - bits[0]).tolist())
            assert figures["seed_sd"] == pytest.approx(np.std(figures["by_seed"], ddof=1))
            low, high = figures["interval"]
            # Pairing removes the variance between documents
            assert low < figures["difference"] < high and high - low < 0.1 * np.ptp(
                of[0]["interval"]
            )


def test_the_interval_is_that_of_the_differences_and_of_one_model_that_of_eval() -> None:
    sizes, nats = scores(seeds=1)
    baseline, variant, _ = paired_metrics(sizes, nats, 300, 3)
    drawn = stratified(
        [np.stack([sizes[d], nats[d][0, 0], nats[d][1, 0]], axis=1) for d in DOCUMENTS], 300, 3
    )
    for domain, sums in zip(DOCUMENTS, drawn, strict=True):
        bits = math.log(2) * sums[:, 0]
        assert baseline["domains"][domain]["interval"] == pytest.approx(
            ratio_interval(sums[:, 1], bits)
        )
        assert variant["domains"][domain]["interval"] == pytest.approx(
            np.quantile((sums[:, 2] - sums[:, 1]) / bits, [0.025, 0.975])
        )
    assert variant["total"]["seed_sd"] is None


def test_identical_models_differ_by_exactly_nothing_and_one_document_has_no_interval() -> None:
    sizes, nats = scores(models=2)
    for values in nats.values():
        values[1] = values[0]
    figures = paired_metrics(sizes, nats, 300, 0)[1]
    for f in (*figures["domains"].values(), figures["total"]):
        assert (
            f["difference"] == 0
            and f["interval"] == [0, 0]
            and f["by_seed"] == [0, 0]
            and f["seed_sd"] == 0
        )
    sizes["prose"], nats["prose"] = sizes["prose"][:1], scores()[1]["prose"][:2, :, :1]
    figures = paired_metrics(sizes, nats, 300, 0)[1]
    assert (
        figures["domains"]["prose"]["interval"] is None
        and figures["domains"]["prose"]["difference"] != 0
    )
    assert figures["total"]["interval"][0] < figures["total"]["interval"][1]


@pytest.mark.thorough
def test_scores_are_those_of_eval_are_kept_and_are_of_these_documents(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    documents = ValidationDocuments(tmp_path / "validation_text", TEXTS)
    score = score_run(tmp_path / "run", 3, documents, "cpu")
    figures = evaluate_model(open_model(tmp_path / "run"), TEXTS, EvaluationProtocol(resamples=2))[
        "domains"
    ]
    for domain, rows in score["sums"].items():
        sums = np.array(rows).sum(axis=0)
        assert sums[NATS] / sums[BYTES] / math.log(2) == pytest.approx(figures[domain]["bpb"])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert score_run(tmp_path / "run", 3, documents, "cpu") == json.loads(json.dumps(score))
    with pytest.raises(
        ScalingError,
        match=f"{SUMS} is of other held-out documents than .*validation_text",
    ):
        score_run(
            tmp_path / "run",
            3,
            ValidationDocuments(documents.folder, TEXTS | {"code": TEXTS["code"][1:]}),
            "cpu",
        )
    (tmp_path / "run" / SUMS).write_text("{")
    with pytest.raises(ScalingError, match=f"{SUMS} cannot be read .*; remove it"):
        score_run(tmp_path / "run", 3, documents, "cpu")


@pytest.mark.thorough
def test_the_plot_shows_all_variants(tmp_path: Path) -> None:
    for seeds in (1, 2):
        baseline, *variants = (
            {"name": f"m{i}", **m}
            for i, m in enumerate(paired_metrics(*scores(seeds=seeds), 20, 0))
        )
        plot_ablation(
            {"baseline": baseline, "variants": variants, "seeds": list(range(seeds))},
            tmp_path / "a.svg",
        )
        drawn = (tmp_path / "a.svg").read_text()
        assert "<svg" in drawn
    with pytest.raises(UserError, match="cannot be written: No such file"):
        plot_ablation(
            {"baseline": baseline, "variants": variants, "seeds": [0]}, tmp_path / "none" / "a.png"
        )


@pytest.mark.thorough
def test_the_shipped_ablation_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextpt.scaling.ablation.load_manifest", lambda path: None)
    monkeypatch.setattr("nextpt.scaling.ablation.check_dataset", lambda config, manifest: None)
    ablation = load_ablation(ROOT / "configs" / "ablations" / "code-weight.yaml")
    assert [list(ablation.changes(variant).values()) for variant in ablation.all] == [
        [],
        [[1.0, 2.0]],
        [[1.0, 4.0]],
    ]
    assert (
        len({run.name for run in ablation.runs()}) == 9
        and ablation.config(ablation.runs()[-1]).run.seed == 2
    )
