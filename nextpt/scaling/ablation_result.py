"""Results of an ablation: every run scored once on the held-out documents, and the differences."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextpt.base.errors import ScalingError
from nextpt.base.files import canonical_json
from nextpt.evaluate.bootstrap import CONFIDENCE
from nextpt.evaluate.evaluation import (
    BYTES,
    NATS,
    EvaluationProtocol,
    describe_protocol,
    document_sums,
)
from nextpt.evaluate.loaded_model import open_model
from nextpt.evaluate.texts import validation_folder, validation_texts
from nextpt.scaling.ablation import Ablation
from nextpt.scaling.paired import paired_metrics
from nextpt.scaling.record import write_json

SUMS = "documents.json"  # in a run's folder
PROTOCOL = EvaluationProtocol()  # of `nextpt eval` without options


@dataclass(frozen=True)
class ValidationDocuments:
    """Documents that all models are scored on.

    Attributes:
        folder: Their folder.
        texts: Documents of each domain.
    """

    folder: Path
    texts: dict[str, list[str]]

    @classmethod
    def of(cls, data: Path) -> ValidationDocuments:
        """Read the held-out documents of a dataset folder. Raises DataError."""
        return cls(validation_folder(data), validation_texts(data))

    @property
    def sha256(self) -> str:
        """SHA-256 of the documents."""
        return sha256(canonical_json(self.texts).encode()).hexdigest()


def score_run(
    run: Path, step: int, documents: ValidationDocuments, device: torch.device | str
) -> dict[str, Any]:
    """Score a run, or read RUN/documents.json where it was scored before.

    Returns:
        {"step", "documents_sha256", "protocol", "sums": domain -> [documents, 4]}.

    Raises:
        ScalingError: The file is damaged or is of other documents.
        CheckpointError: The run has no such checkpoint.
        DataError: The documents cannot be scored.
    """
    path = run / SUMS
    if path.exists():
        scores = _read(path)
        if scores["documents_sha256"] != documents.sha256:
            raise ScalingError(
                f"{path} is of other held-out documents than {documents.folder} (SHA-256"
                f" {scores['documents_sha256'][:12]} -> {documents.sha256[:12]}); remove it and"
                " those of the other runs to score all again, or restore the documents"
            )
        if scores["step"] == step:
            return scores
    source = open_model(run, step, device)
    sums = document_sums(source, documents.texts, PROTOCOL)
    scores = {
        "step": step,
        "documents_sha256": documents.sha256,
        "protocol": describe_protocol(source, PROTOCOL),
        "sums": {domain: rows.tolist() for domain, rows in sums.items()},
    }
    write_json(scores, path)
    return scores


def _read(path: Path) -> dict[str, Any]:
    try:
        scores: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "heldout_sha256" in scores:  # its name until dataset format version 3
            scores["documents_sha256"] = scores.pop("heldout_sha256")
        if not {"step", "documents_sha256", "protocol", "sums"} <= scores.keys():
            raise ValueError("keys are missing")
        return scores
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ScalingError(
            f"{path} cannot be read ({error}); remove it to score the run again"
        ) from None


def result_of(
    ablation: Ablation, documents: ValidationDocuments, scores: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Build the content of DIR/ablation.json.

    Args:
        ablation: The ablation.
        documents: The documents.
        scores: Name of each run -> result of `score_run`.
    """
    grid = [
        [scores[ablation.seeded(variant, seed).name] for seed in ablation.seeds]
        for variant in ablation.all
    ]
    columns = {
        d: np.array([[run["sums"][d] for run in variant_runs] for variant_runs in grid])
        for d in documents.texts
    }
    sizes = {d: values[0, 0, :, BYTES] for d, values in columns.items()}
    if not all((values[..., BYTES] == sizes[d]).all() for d, values in columns.items()):
        raise ScalingError(
            f"the {SUMS} of the runs in {ablation.dir} have documents of different sizes; remove"
            " them, and the runs are scored again"
        )
    metrics = paired_metrics(
        sizes,
        {d: values[..., NATS] for d, values in columns.items()},
        PROTOCOL.resamples,
        PROTOCOL.seed,
    )
    described = [
        {
            "name": variant.name,
            "runs": [
                str(ablation.folder(ablation.seeded(variant, seed))) for seed in ablation.seeds
            ],
            "changes": ablation.changes(variant),
            **variant_metrics,
        }
        for variant, variant_metrics in zip(ablation.all, metrics, strict=True)
    ]
    scored = grid[0][0]["protocol"]
    return {
        "base": str(ablation.base),
        "overrides": ablation.overrides,
        "seeds": ablation.seeds,
        "step": grid[0][0]["step"],
        "documents": {"folder": str(documents.folder), "sha256": documents.sha256},
        "protocol": (
            scored
            | {
                "intervals": (
                    scored["intervals"]
                    | {
                        "method": (
                            "paired percentile bootstrap of documents, each domain by itself; means"
                            " over seeds"
                        ),
                        "confidence": CONFIDENCE,
                    }
                )
            }
        ),
        "baseline": described[0],
        "variants": described[1:],
    }
