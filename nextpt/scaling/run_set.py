"""Sets of runs: a YAML file with their base config, their folder and the keys that each changes.

Ladders (ladder.py) and ablations (ablation.py) are such sets, and the trials of a search
(tuning.py), whose set no file describes. The folder of a run is DIR/NAME; a finished run is not
trained again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError
from yaml import YAMLError

from nextpt.base.errors import EXIT_USER_ERROR, ScalingError, first_problem
from nextpt.config import Config, differences, load_config
from nextpt.config.reader import read_yaml, text_keys
from nextpt.config.section import Section, key
from nextpt.data.epochs import count_epoch
from nextpt.events import decided_batches, read_events
from nextpt.job.exit_record import read_exit_record
from nextpt.model import ModelSpec, count
from nextpt.scaling.observations import FLOPS_PER_PARAMETER_AND_TOKEN


class NamedRun(Section):
    """One run of a set."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run, and its folder's"
    )
    overrides: list[str] = Field(description="keys of the base config, key.sub=value")


class RunSet(Section):
    """Base class of sets of runs."""

    base: Path = key(
        is_path=True, description="config that all runs share, relative to the set's file"
    )
    dir: Path = key(is_path=True, description="folder of the runs and of what follows from them")
    overrides: list[str] = Field(default_factory=list, description="keys that all runs change")

    def folder(self, run: NamedRun) -> Path:
        """Run folder of a run."""
        return self.dir / run.name

    def arguments(self, run: NamedRun) -> list[str]:
        """Return all overrides of a run."""
        return [
            *self.overrides,
            *run.overrides,
            f"run.name={run.name}",
            f"run.dir={self.folder(run)}",
        ]

    def config(self, run: NamedRun) -> Config:
        """Load the config of a run. Raises ConfigError and DataError."""
        return count_epoch(load_config(self.base, self.arguments(run)))

    def last_step(self, run: NamedRun) -> int:
        """Return the last step of a run, with the batch sizes that it has decided so far."""
        config = self.config(run)
        records = read_events(self.folder(run) / "metrics.jsonl")
        return config.last_step_with(decided_batches(config.batches, records))

    def flops(self, run: NamedRun) -> float:
        """Return the training compute C = 6 N D, FLOPs, with all parameters."""
        return training_flops(self.config(run))

    def final_validation(self, run: NamedRun) -> dict[str, Any] | None:
        """Return the record of the validation after the last step; None for an unfinished run.

        Raises:
            ScalingError: The folder holds a run of another config.
        """
        last_step, has_begun = self.last_step(run), self.is_begun(run)
        events = read_events(self.folder(run) / "metrics.jsonl", "validation")
        finished = has_begun and bool(events) and events[-1]["step"] >= last_step
        return events[-1] if finished else None

    def loss(self, run: NamedRun) -> float | None:
        """Validation loss after the last step, nats per token; infinite for a run that diverged.

        Returns:
            None for a run that is not finished.

        Raises:
            ScalingError: The folder holds a run of another config.
        """
        if event := self.final_validation(run):
            loss = event["total"]["nats_per_token"]
            return float(loss) if loss is not None and math.isfinite(loss) else math.inf
        return math.inf if self.has_diverged(run) else None

    def has_diverged(self, run: NamedRun) -> bool:
        """Return whether the run ended because of bad steps in a row (the guard's).

        Raises:
            ScalingError: The folder holds a run of another config.
        """
        record = read_exit_record(self.folder(run))
        if record is None or record["code"] != EXIT_USER_ERROR or not self.is_begun(run):
            return False
        skips = read_events(self.folder(run) / "metrics.jsonl", "skip")
        limit = self.config(run).guard.rollback_after
        return bool(skips) and int(skips[-1]["consecutive"]) >= limit

    def is_begun(self, run: NamedRun) -> bool:
        """Return whether the run has begun.

        Raises:
            ScalingError: Its folder holds a run of another config.
        """
        folder = self.folder(run)
        if not (folder / "config.yaml").is_file():
            return False
        before = load_config(folder / "config.yaml", warn_deprecated=False)
        config = self.config(run)
        changed = differences(before, config)[1]
        if before.total_steps != config.total_steps:
            changed.append(f"steps: {before.total_steps} -> {config.total_steps}")
        if changed:
            raise ScalingError(
                f"{folder} holds a run of another config than {run.name} ({', '.join(changed)});"
                " remove it, or give the set another dir"
            )
        return True


def training_flops(config: Config) -> float:
    """Return the training compute C = 6 N D of a run, FLOPs, with all parameters."""
    parameters = count(ModelSpec.from_config(config)).parameters
    return float(FLOPS_PER_PARAMETER_AND_TOKEN * parameters * config.total_tokens)


Kind = TypeVar("Kind", bound=RunSet)


def read_set(kind: type[Kind], path: Path, name: str) -> Kind:
    """Read a set from its YAML file.

    Args:
        kind: Class of the set.
        path: The file; the base config is relative to its folder.
        name: Of the kind of set, for messages.

    Raises:
        ScalingError: The file cannot be read or a key is wrong; names the file and the key.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8-sig"), text_keys(kind))
        if not isinstance(values, dict):
            raise ScalingError(
                f"{path}: expected the keys of {name}: {', '.join(kind.model_fields)}"
            )
        run_set = kind.model_validate(
            OmegaConf.to_container(OmegaConf.create(values), resolve=True)
        )
    except ValidationError as error:
        raise ScalingError(
            f"{path}: {first_problem(error)}; {name} has {', '.join(kind.model_fields)}"
        ) from None
    except OSError as error:
        raise ScalingError(f"{path} cannot be read: {error.strerror}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        raise ScalingError(f"{path}: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ScalingError(f"{path}: nested too deeply, or a value contains itself") from None
    return run_set.model_copy(update={"base": path.parent / run_set.base})


def first_duplicate(values: list[str]) -> str | None:
    """Return the first value that occurs more than once."""
    return next((value for value in values if values.count(value) > 1), None)
