"""Configs for jobs of one optimizer on real ranks, and their checkpoints.

See tests.support.sign_momentum for the jobs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import Config, to_yaml
from nextpt.events import read_events
from tests.support.datasets import tiny
from tests.support.ranks import run_ranks


class Jobs:
    """Jobs for tests.support.sign_momentum, and their results.

    Args:
        dataset: Shards to train on.
        root: Folder for everything.
        steps: Length of the runs.
        **sections: Sections of all configs.
    """

    def __init__(self, dataset: Path, root: Path, steps: int, **sections: Any) -> None:
        self.dataset, self.root, self.started = dataset, root, 0
        self.steps, self.sections = steps, {"optimizer": {"lr": 3e-3}} | sections

    def write(self, run: str, **sections: Any) -> str:
        """The path of a config of a run."""
        train = {"steps": self.steps, "global_batch_size": 6, "micro_batch_size": 1}
        sections["train"] = train | sections.get("train", {})
        config: Config = tiny(self.dataset, self.root / run, **self.sections | sections)
        self.started += 1
        path = self.root / f"config-{self.started}.yaml"
        path.write_text(to_yaml(config))
        return str(path)

    def run(self, jobs: list[dict[str, Any]], ranks: int) -> list[Any]:
        self.started += 1
        folder = self.root / f"ranks-{self.started}"
        folder.mkdir()
        (folder / "jobs.json").write_text(json.dumps(jobs))
        out = folder / "out.json"
        module = "tests.support.sign_momentum"
        run_ranks(["-m", module, str(folder / "jobs.json"), str(out)], ranks, folder)
        return json.loads(out.read_text())

    def losses(self, run: str) -> list[float]:
        events = read_events(self.root / run / "metrics.jsonl", "train")
        return [event["loss"] for event in events]

    def state(self, run: str, folder: str = "checkpoints") -> dict[tuple[str, str], torch.Tensor]:
        checkpoint = open_checkpoint(self.root / run / folder)
        return {
            (name, kind): checkpoint.read_whole(name, kind)
            for name, kinds in checkpoint.state_shapes().items()
            for kind in kinds
        }
