"""An ablation: runs that differ from a baseline in a few keys, compared on the same held-out documents.

Runs of one seed see the same data in the same order from the same initialisation, so a variant is compared with the baseline of its own
seed, document by document. The interval is of those pairs: documents are resampled, all runs together (a paired bootstrap). How much a
difference changes from seed to seed is shown beside it; it is not in the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from nextpt.errors import ScalingError
from nextpt.evaluate.bootstrap import CONFIDENCE, stratified
from nextpt.evaluate.documents import score_documents
from nextpt.evaluate.heldout import encode_document, heldout_texts
from nextpt.evaluate.source import open_source
from nextpt.scaling.runs import Rung, RunSet, load_set

RESAMPLES = 1000
Scored = dict[str, np.ndarray]  # domain -> nats of the text of each document, fp64 [documents]


class Ablation(RunSet):
    """An ablation as its YAML file says."""

    seeds: list[int] = Field([0], min_length=1, description="every run once with each as run.seed")
    baseline: Rung = Field(description="what the others are compared with")
    variants: list[Rung] = Field(min_length=1, description="what is changed")

    def run(self, of: Rung, seed: int) -> Rung:
        """One run of the baseline or a variant."""
        return Rung(name=f"{of.name}-seed{seed}", overrides=[*of.overrides, f"run.seed={seed}"])

    @property
    def all(self) -> list[Rung]:
        return [self.run(of, seed) for seed in self.seeds for of in (self.baseline, *self.variants)]


def load_ablation(path: Path) -> Ablation:
    """Read and check an ablation, and every run's config. Raises ScalingError and ConfigError."""
    found = load_set(path, Ablation)
    base = found.config(found.run(found.baseline, found.seeds[0]))
    for variant in found.variants:
        config = found.config(found.run(variant, found.seeds[0]))
        if config.data != base.data:
            raise ScalingError(f"{path}: variant {variant.name} has other data than {found.baseline.name}; its documents could not be compared")
        if config.model_copy(update={"run": base.run}) == base:
            raise ScalingError(f"{path}: variant {variant.name} changes nothing of {found.baseline.name}")
    return found


def score_run(folder: Path, texts: dict[str, list[str]], progress: Callable[[str, float], None] = lambda domain, share: None) -> Scored:
    """Nats of each document under the newest checkpoint of a run, in windows of the whole context that move by half of it."""
    source = open_source(folder)
    window = source.config.max_position
    scored = {}
    for domain, documents in texts.items():
        tokens, sizes = zip(*(encode_document(source.tokenizer, text) for text in documents), strict=True)
        _, scored[domain] = score_documents(source.model, tokens, sizes, source.tokenizer.token_bytes(), window=window, stride=max(1, window // 2),
                                            progress=partial(progress, domain))
    return scored


def compare(ablation: Ablation, scored: dict[str, Scored], texts: dict[str, list[str]]) -> dict[str, Any]:
    """DIR/ablation.json. scored: run -> nats of its documents. Bits per byte are ratios of sums over documents."""
    bits = {domain: math.log(2) * np.array([len(text.encode()) for text in documents], float) for domain, documents in texts.items()}
    runs = [rung.name for rung in ablation.all]
    columns = {domain: np.stack([bits[domain], *(scored[run][domain] for run in runs)], axis=1) for domain in texts}
    drawn = dict(zip(columns, stratified(list(columns.values()), RESAMPLES, 0), strict=True))
    sums = {domain: values.sum(axis=0, keepdims=True) for domain, values in columns.items()}
    for table in (sums, drawn):
        table["total"] = sum(table[domain] for domain in texts)

    def bpb(table: np.ndarray, of: Rung, seed: int) -> np.ndarray:
        return table[:, 1 + runs.index(ablation.run(of, seed).name)] / table[:, 0]

    def mean_bpb(domain: str) -> dict[str, Any]:
        by_seed = [float(bpb(sums[domain], ablation.baseline, seed)[0]) for seed in ablation.seeds]
        return {"bpb_text": float(np.mean(by_seed)), "by_seed": by_seed}

    def difference(domain: str, variant: Rung) -> dict[str, Any]:
        each, resampled = ([bpb(table[domain], variant, seed) - bpb(table[domain], ablation.baseline, seed) for seed in ablation.seeds]
                           for table in (sums, drawn))
        ends = np.quantile(np.mean(resampled, axis=0), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return {"difference": float(np.mean(each)), "interval": ends.tolist() if len(columns.get(domain, runs)) > 1 else None,
                "by_seed": [float(d[0]) for d in each]}

    domains = [*texts, "total"]
    return {
        "dir": str(ablation.dir), "seeds": ablation.seeds, "documents": {domain: len(documents) for domain, documents in texts.items()},
        "intervals": {"confidence": CONFIDENCE, "method": "paired percentile bootstrap of documents, seeds averaged", "resamples": RESAMPLES},
        "baseline": {"name": ablation.baseline.name, "overrides": ablation.baseline.overrides, "domains": {d: mean_bpb(d) for d in domains}},
        "variants": {v.name: {"overrides": v.overrides, "domains": {d: difference(d, v) for d in domains}} for v in ablation.variants},
    }


def heldout_of(ablation: Ablation) -> dict[str, list[str]]:
    """domain -> the held-out documents of the runs' dataset."""
    return heldout_texts(Path(ablation.config(ablation.all[0]).data.path))
