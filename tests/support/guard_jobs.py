"""Lists of training jobs with faults, run one after another in one pair of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nextpt.config import to_yaml
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.ranks import run_ranks


class Jobs:
    """Jobs of one pair of processes: added to a list, then run."""

    def __init__(self, dataset: Path, root: Path) -> None:
        self.dataset, self.root, self.jobs, self.names = dataset, root, [], []

    def add(
        self, name: str, run: str | None = None, sections: dict[str, Any] | None = None, **job: Any
    ) -> None:
        """A job of its own name, in the run folder of another where `run` is given."""
        sections = {"schedule": {"kind": "constant", "warmup": 0}, "optimizer": {"lr": 1e-3}} | (
            sections or {}
        )
        path = self.root / f"{len(self.jobs)}.yaml"
        path.write_text(to_yaml(tiny(self.dataset, self.root / (run or name), **sections)))
        self.jobs.append({"config": str(path)} | job)
        self.names.append(name)

    def run(self) -> None:
        (self.root / "jobs.json").write_text(json.dumps(self.jobs))
        run_ranks(
            [
                "-m",
                "tests.support.guard_probe",
                str(self.root / "jobs.json"),
                str(self.root / "out"),
            ],
            2,
            self.root / "logs",
        )
        self.outcomes = [
            dict(
                zip(
                    self.names,
                    json.loads((self.root / f"out-{rank}.json").read_text()),
                    strict=True,
                )
            )
            for rank in range(2)
        ]

    def outcome(self, name: str) -> list[Any]:
        per_rank = [outcomes[name]["outcome"] for outcomes in self.outcomes]
        assert per_rank[0][0] == per_rank[1][0], per_rank
        return per_rank[0]

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        return read_events(self.root / run / "metrics.jsonl", kind)

    def losses(self, run: str) -> dict[int, float]:
        events = self.events(run, "train")
        assert len({e["step"] for e in events}) == len(events)
        return {e["step"]: e["loss"] for e in events}
