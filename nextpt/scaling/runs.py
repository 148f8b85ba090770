"""Sets of runs that a YAML file describes: one base config, and what each run changes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml import YAMLError

from nextpt.config import Config, load_config
from nextpt.errors import ScalingError
from nextpt.events import read_events


class Rung(BaseModel):
    """One run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run, and its folder's")
    overrides: list[str] = Field(description="keys of the base config, key.sub=value")


class RunSet(BaseModel):
    """What all such files have."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    base: Path = Field(description="config that all runs share, relative to the file")
    dir: Path = Field(description="folder of the runs and of what comes out")
    overrides: list[str] = Field(default_factory=list, description="keys that all runs change")

    @property
    def all(self) -> list[Rung]:
        """Every run."""
        raise NotImplementedError

    def folder(self, rung: Rung) -> Path:
        return self.dir / rung.name

    def arguments(self, rung: Rung) -> list[str]:
        """Overrides of a run: one validation, after the last step."""
        own = [*self.overrides, *rung.overrides, f"run.name={rung.name}", f"run.dir={self.folder(rung)}"]
        return [*own, f"validation.every_steps={load_config(self.base, own).total_steps}"]

    def config(self, rung: Rung) -> Config:
        return load_config(self.base, self.arguments(rung))


Kind = TypeVar("Kind", bound=RunSet)


def load_set(path: Path, kind: type[Kind]) -> Kind:
    """Read a file of runs. Raises ScalingError, also for two runs of one name."""
    try:
        found = kind.model_validate(OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    except ValidationError as error:
        first = error.errors()[0]
        raise ScalingError(f"{path}: {'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}; it has {', '.join(kind.model_fields)}") from None
    except OSError as error:
        raise ScalingError(f"{path} cannot be read: {error.strerror}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        raise ScalingError(f"{path}: {' '.join(str(error).split())}") from error
    found = found.model_copy(update={"base": path.parent / found.base})
    names = [rung.name for rung in found.all]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ScalingError(f"{path}: two runs have the name {twice}; each needs a folder of its own")
    return found


def is_done(runs: RunSet, rung: Rung) -> bool:
    """Whether a run was trained to its end. Raises ScalingError where its folder holds another."""
    folder = runs.folder(rung)
    events = read_events(folder / "metrics.jsonl", "validation")
    if not events or not (folder / "config.yaml").is_file():
        return False
    config, before = runs.config(rung), load_config(folder / "config.yaml")
    if _what_counts(config) != _what_counts(before):
        raise ScalingError(f"{folder} holds a run of another config than {rung.name}; remove it, or give another dir")
    return events[-1]["step"] >= config.total_steps


def _what_counts(config: Config) -> tuple[object, ...]:
    return (config.model, config.optimizer, config.objective, config.run.seed, config.data.sequence_length, config.total_steps)
