"""Ablations: a baseline and variants of it, each trained with several seeds.

Runs of one seed share their initial weights and the order of their data wherever the variant does
not change these itself, so a variant is compared with the baseline of the same seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from nextpt.base.errors import ConfigError, ScalingError, UserError
from nextpt.checkpoint.folders import steps
from nextpt.config import Config, flatten
from nextpt.data.dataset import check_dataset
from nextpt.data.sequences import load_manifest
from nextpt.scaling.run_set import NamedRun, RunSet, first_duplicate, read_set

WEIGHTS = "objective.domain_weights."


class Ablation(RunSet):
    """An ablation, as its YAML file describes it."""

    seeds: list[int] = Field(
        [0], min_length=1, description="run.seed of the runs; each variant is trained with each"
    )
    baseline: NamedRun = Field(description="run that the variants are compared with")
    variants: list[NamedRun] = Field(
        min_length=1, description="runs that are compared with the baseline"
    )

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{seeds} repeats a seed, whose runs would be the same")
        return seeds

    @property
    def all(self) -> list[NamedRun]:
        """The baseline, then the variants."""
        return [self.baseline, *self.variants]

    def seeded(self, variant: NamedRun, seed: int) -> NamedRun:
        """The run of a variant with a seed: NAME-sSEED."""
        return NamedRun(
            name=f"{variant.name}-s{seed}", overrides=[*variant.overrides, f"run.seed={seed}"]
        )

    def runs(self) -> list[NamedRun]:
        """All runs, those of a seed together."""
        return [self.seeded(variant, seed) for seed in self.seeds for variant in self.all]

    @property
    def data(self) -> Path:
        """The dataset folder of the baseline, whose held-out documents all models are scored on."""
        return Path(self.config(self.seeded(self.baseline, self.seeds[0])).data.path)

    def changes(self, variant: NamedRun) -> dict[str, list[Any]]:
        """Return the keys that differ from the baseline: [baseline value, variant value]."""
        base, other = (
            _run_settings(self.config(self.seeded(run, self.seeds[0])))
            for run in (self.baseline, variant)
        )
        pairs = {
            key: [keys.get(key, 1.0 if key.startswith(WEIGHTS) else None) for keys in (base, other)]
            for key in sorted(base.keys() | other.keys())
        }
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def load_ablation(path: Path) -> Ablation:
    """Read and check an ablation, every config of it, and that the dataset fits.

    Raises ScalingError, ConfigError and DataError.
    """
    ablation = read_set(Ablation, path, "an ablation")
    if duplicate := first_duplicate([variant.name for variant in ablation.all]):
        raise ScalingError(
            f"{path}: two variants have the name {duplicate}; each needs folders of its own"
        )
    for key, overrides in (
        ("overrides", ablation.overrides),
        *((run.name, run.overrides) for run in ablation.all),
    ):
        for override in overrides:
            if override.startswith("run."):
                raise ScalingError(
                    f"{path}: {key}: {override}: names and folders follow from the variant's name,"
                    " seeds are the file's `seeds`"
                )
    for variant in ablation.all:
        _check(ablation, variant, path)
    changes = [ablation.changes(variant) for variant in ablation.all]
    for number, variant in enumerate(ablation.variants):
        if changes[number + 1] in changes[: number + 1]:
            same = ablation.all[changes.index(changes[number + 1])]
            raise ScalingError(
                f"{path}: variants.{number}: {variant.name} is the same run as {same.name}; change"
                " a key of one, or leave it out"
            )
    return ablation


def _check(ablation: Ablation, variant: NamedRun, path: Path) -> None:
    """Check the config of a variant and its dataset; training checks remote datasets."""
    try:
        config = ablation.config(ablation.seeded(variant, ablation.seeds[0]))
        if config.data.remote is None:
            check_dataset(config, load_manifest(config.data.path))
    except UserError as error:
        raise ConfigError(f"{path}: {variant.name}: {error}") from None


def _run_settings(config: Config) -> dict[str, Any]:
    """Return the keys that determine a run, without its name and folder.

    A domain weight of 1 is left out.
    """
    values = config.model_dump(mode="json")
    weights = values["objective"].pop("domain_weights")
    settings = flatten(values) | {
        f"{WEIGHTS}{domain}": weight for domain, weight in weights.items() if weight != 1
    }
    return {key: value for key, value in settings.items() if key not in ("run.name", "run.dir")}


def is_done(ablation: Ablation, run: NamedRun) -> bool:
    """Return whether a run is finished. Raises ScalingError where its folder holds another run."""
    return ablation.is_begun(run) and max(
        steps(ablation.folder(run) / "checkpoints"), default=0
    ) >= ablation.last_step(run)
