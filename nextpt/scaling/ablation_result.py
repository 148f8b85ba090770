"""What an ablation found: every run scored on the held-out documents, once, and the differences between them."""

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
from nextpt.evaluate.heldout import heldout_texts
from nextpt.evaluate.loaded_model import open_model
from nextpt.scaling.ablation import Ablation
from nextpt.scaling.paired import paired_figures
from nextpt.scaling.record import write_json

SUMS = "documents.json"  # in a run's folder
PROTOCOL = EvaluationProtocol()  # of `nextpt eval` without options


@dataclass(frozen=True)
class HeldOut:
    """Documents that all models are scored on. texts: domain -> documents."""

    folder: Path
    texts: dict[str, list[str]]

    @classmethod
    def of(cls, data: Path) -> HeldOut:
        """Those of a dataset folder. Raises DataError."""
        return cls(data / "heldout_text", heldout_texts(data))

    @property
    def sha256(self) -> str:
        return sha256(canonical_json(self.texts).encode()).hexdigest()


def score_run(run: Path, step: int, heldout: HeldOut, device: torch.device | str) -> dict[str, Any]:
    """RUN/documents.json, made where it is not there: {"step", "heldout_sha256", "protocol", "sums": domain -> [documents, 4]}.

    Raises ScalingError where the file is of other documents or damaged, CheckpointError and
    DataError of the run.
    """
    path = run / SUMS
    if path.exists():
        found = _read(path)
        if found["heldout_sha256"] != heldout.sha256:
            raise ScalingError(
                f"{path} is of other held-out documents than those in {heldout.folder} now (SHA-256"
                f" {found['heldout_sha256'][:12]} -> {heldout.sha256[:12]}); remove it and those of"
                " the other runs to score all again, or bring the documents back"
            )
        if found["step"] == step:
            return found
    source = open_model(run, step, device)
    sums = document_sums(source, heldout.texts, PROTOCOL)
    found = {
        "step": step,
        "heldout_sha256": heldout.sha256,
        "protocol": describe_protocol(source, PROTOCOL),
        "sums": {domain: rows.tolist() for domain, rows in sums.items()},
    }
    write_json(found, path)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not {"step", "heldout_sha256", "protocol", "sums"} <= found.keys():
            raise ValueError("keys are missing")
        return found
    except (OSError, ValueError, AttributeError) as error:
        raise ScalingError(
            f"{path} cannot be read ({error}); remove it, and the run is scored again"
        ) from None


def result_of(
    ablation: Ablation, heldout: HeldOut, scores: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What DIR/ablation.json holds. scores: name of a run -> what `score_run` gave."""
    grid = [
        [scores[ablation.seeded(variant, seed).name] for seed in ablation.seeds]
        for variant in ablation.all
    ]
    columns = {
        d: np.array([[one["sums"][d] for one in of_variant] for of_variant in grid])
        for d in heldout.texts
    }
    sizes = {d: values[0, 0, :, BYTES] for d, values in columns.items()}
    assert all((values[..., BYTES] == sizes[d]).all() for d, values in columns.items())
    figures = paired_figures(
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
            **found,
        }
        for variant, found in zip(ablation.all, figures, strict=True)
    ]
    scored = grid[0][0]["protocol"]
    return {
        "base": str(ablation.base),
        "overrides": ablation.overrides,
        "seeds": ablation.seeds,
        "step": grid[0][0]["step"],
        "heldout": {"folder": str(heldout.folder), "sha256": heldout.sha256},
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
