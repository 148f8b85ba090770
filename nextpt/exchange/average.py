"""Mean of checkpoints' weights as a checkpoint of its own, in a folder like a run's.

The mean of the last checkpoints of a constant learning rate is near what a decay would have given
(LAWA, arXiv 2209.14981; PMA, arXiv 2505.12082). The folder is read by evaluation, generation and
export; it has no optimizer state to train on from.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nextpt.base.collective import RankGroup
from nextpt.base.errors import CheckpointError
from nextpt.base.json_files import sync
from nextpt.checkpoint.commit import save
from nextpt.checkpoint.folders import list_checkpoints
from nextpt.checkpoint.format import Checkpoint
from nextpt.checkpoint.manifest import lineage_of
from nextpt.checkpoint.selection import open_folder
from nextpt.checkpoint.state import WEIGHT, Fragment
from nextpt.exchange.folders import new_folder

KEPT = ("step", "tokens", "config", "data")  # of the newest checkpoint's state
RUN_FILES = ("config.yaml", "tokenizer.json")


class WeightMean:
    """A `SavedState`: the mean of the weights of checkpoints, computed in fp64.

    Args:
        checkpoints: At least one; their `weights` are averaged.

    Raises:
        CheckpointError: They are not of one model.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self.checkpoints = checkpoints
        for checkpoint in checkpoints[1:]:
            checkpoint.check_weights(checkpoints[0].shapes())

    def fragments(self) -> Iterator[Fragment]:
        """Yield the mean of one parameter after another, fp32."""
        for name, shape in self.checkpoints[0].shapes().items():
            total = torch.zeros(shape, dtype=torch.float64)
            for checkpoint in self.checkpoints:
                total += checkpoint.read_whole(name)
            mean = (total / len(self.checkpoints)).float().reshape(-1)
            yield Fragment(name, WEIGHT, shape, 0, mean.numel(), mean)

    def scalars(self) -> dict[str, float]:
        """No optimizer, no numbers of it."""
        return {}

    def state_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The weight alone."""
        return {name: {WEIGHT: shape} for name, shape in self.checkpoints[0].shapes().items()}


def checkpoints_to_average(
    run: Path, last: int | None, span: tuple[int, int] | None
) -> dict[int, Path]:
    """Step -> folder of a run's checkpoints, rising: the `last` ones, or those in a span.

    Only checkpoints that the newest one continues count, not those before a rollback.

    Args:
        run: Run folder.
        last: Number of checkpoints.
        span: First and last step.

    Raises:
        CheckpointError: There are fewer than two, or fewer than `last`.
    """
    listed = list_checkpoints(run / "checkpoints").checkpoints
    # Of a step that was saved twice, the newest
    folders = {c.manifest.step: c.folder for c in reversed(lineage_of(listed))}
    steps = sorted(folders)
    chosen = steps[-last:] if last else [s for s in steps if span and span[0] <= s <= span[1]]
    least = max(last or 0, 2)
    if len(chosen) < least:
        raise CheckpointError(
            f"{run} has {len(chosen)} checkpoints to average, expected {least} or more; there are"
            f" those of steps {', '.join(map(str, steps)) or 'none'}: give others with --last or"
            " --steps, and keep more with checkpoint.keep_last"
        )
    return {step: folders[step] for step in chosen}


def write_average(run: Path, chosen: Mapping[int, Path], weights: str, output: Path) -> None:
    """Write the mean of a run's checkpoints as a folder with one checkpoint, of the last step.

    Args:
        run: Run folder.
        chosen: Step -> folder of the checkpoints, rising.
        weights: Kind of state that is averaged: "weight", or "ema-DECAY".
        output: Folder to write; it must not exist.

    Raises:
        CheckpointError: A checkpoint is not valid, or the output cannot be written; nothing is
            left behind.
    """
    checkpoints = [open_folder(folder) for folder in chosen.values()]
    for checkpoint in checkpoints:
        checkpoint.select_weights(weights)
    newest = checkpoints[-1].state
    extras: dict[str, Any] = {"average": {"run": str(run), "steps": [*chosen], "weights": weights}}
    extras |= {name: newest[name] for name in KEPT if name in newest}
    with new_folder(output) as folder:
        for name in RUN_FILES:
            if (run / name).is_file():
                shutil.copyfile(run / name, folder / name)
                sync(folder / name)
        save(folder / "checkpoints", WeightMean(checkpoints), extras, {}, RankGroup.world())
