"""`nextpt kernels`: try every implementation of attention in the shapes of a config."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.console import build_table, console, echo
from launcher.options import ConfigFile, Overrides, PrintJson
from launcher.registration import add_command
from nextpt.base.errors import ConfigError

if TYPE_CHECKING:
    from kernels.trials import Trial

Device = Annotated[
    str, typer.Option(help="cuda or cpu [default: cuda where there is one]", show_default=False)
]
Seconds = Annotated[
    float,
    typer.Option(min=1, help="seconds that one implementation may take, compilation included"),
]


def try_kernels(
    config: ConfigFile,
    overrides: Overrides = None,
    device: Device = "auto",
    seconds: Seconds = 180.0,
    as_json: PrintJson = False,
) -> None:
    """Try every implementation of attention in the shapes of a config.

    Each is compared with the reference and timed, forward and backward, for all layers of one
    micro-batch of packed documents with the lengths of web text. One that crashes or hangs is
    reported as such. What a run on such a device would choose comes last.
    """
    import torch

    from kernels.trials import Trial, packed_starts, quickest
    from nextpt.config import load_config
    from nextpt.job.environment import host_and_device, versions
    from nextpt.train.kernel_choice import attention_shape, describe_shape, refusals_of, try_all

    run = load_config(config, overrides or [])
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device {device}: expected cpu, or cuda where torch finds a GPU")
    rows, length = run.train.micro_batch_size, run.data.sequence_length
    shape = attention_shape(run, device, rows, length, packed_starts(rows, length))
    refusals = refusals_of(run, device)
    refused = {name: reason for name, reason in refusals.items() if reason is not None}
    trials = try_all([name for name in refusals if name not in refused], shape, device, seconds)
    trials += [Trial(name, reason=reason) for name, reason in refused.items()]
    name, best = host_and_device(torch.device(device))[1], quickest(trials)
    if as_json:
        result = {
            "device": name,
            "versions": versions(),
            "shape": describe_shape(shape),
            "chosen": best,
            "trials": [trial._asdict() for trial in trials],
        }
        print(json.dumps(result, indent=1))
    else:
        _print(trials, best, f"attention of {rows} x {length} packed tokens on {name}")


def _print(trials: list[Trial], best: str | None, title: str) -> None:
    timed = sorted((t for t in trials if t.milliseconds is not None), key=_milliseconds)
    rows = [(t.name, f"{_milliseconds(t):.3g}", f"{t.error:.1e}") for t in timed]
    console.print(build_table(title, ("implementation", "ms", "error"), rows))
    for trial in trials:
        if trial.reason is not None:
            echo(f"{trial.name}: {trial.reason}")
    echo(f"\nchosen: {best or 'none of them'}")


def _milliseconds(trial: Trial) -> float:
    return math.inf if trial.milliseconds is None else trial.milliseconds


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app,
        "kernels",
        try_kernels,
        example="nextpt kernels --config configs/124m.yaml train.micro_batch_size=8",
    )
