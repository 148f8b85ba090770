"""Runs that are trained as a set: a YAML file names their base config, their folder, and what each changes.

Ladders (ladder.py) and ablations (ablation.py) are such sets. A run lies in DIR/NAME; one that is
finished is not trained again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml import YAMLError

from nextpt.base.errors import ScalingError
from nextpt.config import Config, differences, load_config
from nextpt.model import ModelSpec, count
from nextpt.scaling.observations import FLOPS_PER_PARAMETER_AND_TOKEN


class NamedRun(BaseModel):
    """One run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run, and its folder's"
    )
    overrides: list[str] = Field(description="keys of the base config, key.sub=value")


class RunSet(BaseModel):
    """What all sets of runs have."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    base: Path = Field(description="config that all runs share, relative to the set's file")
    dir: Path = Field(description="folder of the runs and of what follows from them")
    overrides: list[str] = Field(default_factory=list, description="keys that all runs change")

    def folder(self, run: NamedRun) -> Path:
        return self.dir / run.name

    def arguments(self, run: NamedRun) -> list[str]:
        """All overrides of a run."""
        return [
            *self.overrides,
            *run.overrides,
            f"run.name={run.name}",
            f"run.dir={self.folder(run)}",
        ]

    def config(self, run: NamedRun) -> Config:
        return load_config(self.base, self.arguments(run))

    def flops(self, run: NamedRun) -> float:
        """C = 6 N D with all parameters."""
        config = self.config(run)
        return float(
            FLOPS_PER_PARAMETER_AND_TOKEN
            * count(ModelSpec.from_config(config)).parameters
            * config.total_steps
            * config.tokens_per_step
        )

    def is_begun(self, run: NamedRun) -> bool:
        """Whether a run's folder holds the run.

        Raises ScalingError where it holds one of another config.
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


Kind = TypeVar("Kind", bound=RunSet)


def read_set(kind: type[Kind], path: Path, what: str) -> Kind:
    """A set as its file says, its base found beside the file. what: its name in messages.

    Raises ScalingError that names file and key.
    """
    try:
        found = kind.model_validate(OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    except ValidationError as error:
        first = error.errors()[0]
        raise ScalingError(
            f"{path}: {'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}; {what} has"
            f" {', '.join(kind.model_fields)}"
        ) from None
    except OSError as error:
        raise ScalingError(f"{path} cannot be read: {error.strerror}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        raise ScalingError(f"{path}: {' '.join(str(error).split())}") from error
    return found.model_copy(update={"base": path.parent / found.base})


def repeated(values: list[str]) -> str | None:
    """The first that comes twice."""
    return next((value for value in values if values.count(value) > 1), None)
