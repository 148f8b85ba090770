"""The large run's config with the values that a search found best, and a header that says how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from nextpt.base.errors import ScalingError
from nextpt.base.files import atomic_write
from nextpt.config import parse_config, read_values
from nextpt.scaling.optimum import Optimum
from nextpt.scaling.proxy import parameters_of
from nextpt.scaling.tuning import Tuned


def check_output(output: Path, config: Path, folder: Path) -> None:
    """Refuse a file that cannot be written, before any trial.

    Args:
        output: File of the config to write.
        config: File of the large run's config.
        folder: DIR, which need not exist yet.

    Raises:
        ScalingError: The output is the config itself, or its folder does not exist.
    """
    if output.resolve() == config.resolve():
        raise ScalingError(f"--output {output} is the config that is tuned; give another file")
    parent = output.absolute().parent
    if parent != folder.absolute() and not parent.is_dir():
        raise ScalingError(f"--output {output} cannot be written: folder {parent} does not exist")


def write_config(
    tuned: Tuned, source: Path, overrides: Sequence[str], command: str, path: Path
) -> None:
    """Write the large config with the values of a search, and a header that says whence they are.

    The keys are those of the source and of the overrides; its comments are not kept.

    Args:
        tuned: The result.
        source: File of the large config.
        overrides: Overrides of it, key=value.
        command: Command line of the search.
        path: The file to write.

    Raises:
        ConfigError: A value is invalid.
        ScalingError: The file cannot be written.
    """
    changes = [f"{key}={value}" for key, value in tuned.values.items()]
    values = read_values(source, [*overrides, *changes])
    parse_config(values, str(path))
    header = "".join(f"# {line}\n" for line in describe(tuned, command))
    try:
        with atomic_write(path) as file:
            file.write(header + OmegaConf.to_yaml(OmegaConf.create(values)))
    except OSError as error:
        raise ScalingError(f"{path} cannot be written: {error.strerror}") from error


def describe(tuned: Tuned, command: str) -> list[str]:
    """Lines that say where the values of the large config come from and what they cost."""
    proxy, cost = tuned.proxy, tuned.cost
    model = proxy.model
    lines = [
        f"Learning rates and decays by `{command}`",
        f"proxy: width {model.width}, depth {model.depth}, {parameters_of(proxy):,} parameters;"
        f" {proxy.total_steps:,} steps of {proxy.train.global_batch_size} sequences,"
        f" {proxy.total_tokens:,} tokens",
        f"cost: {cost['trials']} trials ({cost['diverged']} diverged; seeds"
        f" {', '.join(map(str, tuned.seeds))}), {cost['tokens']:,} tokens,"
        f" {cost['flops']:.3g} FLOPs (6 N D), {format_share(cost['share'])} of the large run",
    ]
    for key, optimum in tuned.optima.items():
        lines += [
            f"{key} of the proxy: {format_optimum(optimum)}",
            f"  x {tuned.factor(key):.3g} = {format_optimum(optimum, tuned.factor(key))}",
        ]
    return [*lines, *describe_transfer(tuned), *(f"note: {note}" for note in tuned.notes)]


def describe_transfer(tuned: Tuned) -> list[str]:
    """Lines that say which factors lead from the proxy to the large run, and what is not known."""
    factors = tuned.transfer
    low, high = factors.lr_range
    return [
        f"factor of learning rates: {factors.lr_for_tokens:.3g} for {factors.tokens:.4g} times the"
        f" tokens (D^-{factors.horizon_exponent:g}, arXiv 2409.19913) x {factors.lr_for_batch:.3g}"
        f" for {factors.batch:g} times the batch (arXiv 2205.10287)",
        f"  published exponents of the tokens give {low:.3g} to {high:.3g}, which no interval"
        " contains",
        f"factor of decays: {factors.weight_decay:.3g} for the time scale of the average over"
        " updates (arXiv 2405.13698, 2505.13738)",
    ]


def format_optimum(optimum: Optimum, factor: float = 1.0) -> str:
    """A best value with its interval, both times a factor, in words."""
    if optimum.interval is None:
        return f"{optimum.value * factor:.3g} (no interval)"
    low, high = (bound * factor for bound in optimum.interval)
    meaning = f"{100 * optimum.level:g} %" if optimum.level else "neighbours on the grid, no level"
    return f"{optimum.value * factor:.3g} ({meaning}: {low:.3g} to {high:.3g})"


def format_share(share: float) -> str:
    """A share in percent, with enough digits for small ones."""
    return f"{100 * share:.3g} %"
