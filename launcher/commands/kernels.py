"""`nextpt kernels`: try every implementation of attention and loss in the shapes of a config."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.console import build_table, console, echo
from launcher.options import ConfigFile, Overrides, PrintJson
from launcher.registration import add_command
from nextpt.base.errors import ConfigError

if TYPE_CHECKING:
    from kernels.trials import Shape, Trial
    from nextpt.config import Config

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
    """Try every implementation of attention and of the loss in the shapes of a config.

    Each is compared with the reference and timed, forward and backward, for one micro-batch: all
    layers of attention, with packed documents of the lengths of web text, and the loss. One that
    crashes or hangs is reported as such. The quickest that is right comes last: on CUDA a run takes
    it, on a CPU the first of a fixed order.
    """
    import torch

    from kernels.trials import quickest
    from nextpt.config import load_config
    from nextpt.job.environment import host_and_device, versions
    from nextpt.train.kernel_choice import OPERATORS, describe_shape

    run = load_config(config, overrides or [])
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device {device}: expected cpu, or cuda where torch finds a GPU")
    name = host_and_device(torch.device(device))[1]
    result: dict[str, Any] = {"device": name, "versions": versions()}
    for operator in OPERATORS:
        shape, trials = _try(run, operator, device, seconds)
        best = quickest(trials)
        if as_json:
            result[operator] = {
                "shape": describe_shape(shape),
                "chosen": best,
                "trials": [trial._asdict() for trial in trials],
            }
        else:
            _print(trials, best, f"{operator}, a micro-batch on {name}")
    if as_json:
        print(json.dumps(result, indent=1))


def _try(run: Config, operator: str, device: str, seconds: float) -> tuple[Shape, list[Trial]]:
    """The shape, and a trial of every implementation, those that are no candidates last."""
    from kernels.attention.trial import packed_starts
    from kernels.trials import Trial
    from nextpt.train import kernel_choice

    if operator == "attention":
        rows, length = run.train.micro_batch_size, run.data.sequence_length
        starts = packed_starts(rows, length)
        shape: Shape = kernel_choice.attention_shape(run, device, rows, length, starts)
    else:
        shape = kernel_choice.loss_shape(run, device)
    refusals = kernel_choice.refusals_of(run, operator, device)
    names = [name for name, reason in refusals.items() if reason is None]
    trials = kernel_choice.try_all(operator, names, shape, device, seconds)
    refused = [Trial(name, reason=reason) for name, reason in refusals.items() if reason]
    return shape, trials + refused


def _print(trials: list[Trial], best: str | None, title: str) -> None:
    timed = sorted((t for t in trials if t.milliseconds is not None), key=_milliseconds)
    rows = [(t.name, f"{_milliseconds(t):.3g}", f"{t.error:.1e}") for t in timed]
    console.print(build_table(title, ("implementation", "ms", "error"), rows))
    for trial in trials:
        if trial.reason is not None:
            echo(f"{trial.name}: {trial.reason}")
    echo(f"chosen: {best or 'none of them'}\n")


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
