"""`nextpt eval --exposure-bias`: loss on the model's own continuations against real text."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from launcher.commands.eval_common import EvaluationInputs, ResultFiles
from launcher.console import build_table, console, echo, format_half_width, progress_bars

if TYPE_CHECKING:
    from nextpt.evaluate.exposure import ExposureProtocol

ARMS = ("real", "sampled", "greedy")


def run_exposure(inputs: EvaluationInputs, exposure: ExposureProtocol, files: ResultFiles) -> None:
    """Measure the exposure bias, print the tables, write the files. Raises UserError."""
    from nextpt.evaluate.exposure import exposure_bias
    from nextpt.observe.exposure_plot import plot_exposure

    source, texts = inputs.open(inputs.step, decoder_only=True)
    with progress_bars("generating in") as progress:
        result = exposure_bias(source, texts, exposure, progress)
    _print_result(result)
    files.write(result, partial(plot_exposure, result))


def _format(metric: dict[str, Any], sign: str = "") -> str:
    return format_half_width(metric["value"], metric["interval"], sign=sign)


def _print_result(result: dict[str, Any]) -> None:
    domains = result["domains"]
    if len(domains) > 1:
        domains = domains | {"total": result["total"]}
    _print_arms(result, domains)
    _print_gaps(domains)
    _print_positions(result)
    intervals = result["protocol"]["intervals"]
    echo(
        "miscalibration: loss on real text minus the entropy of the predictions there. drift: that"
        " entropy minus the loss on the model's own\ntext, 0 if the model's own text were to it"
        " like real text. Special tokens are left out, so the metrics differ slightly from those"
        " of nextpt eval."
    )
    echo(
        f"±: half of {intervals['confidence']:.0%} intervals, bootstrap of documents,"
        f" {intervals['resamples']} resamples, seed {result['protocol']['seed']}; no interval for a"
        " single document"
    )


def _print_arms(result: dict[str, Any], domains: dict[str, Any]) -> None:
    protocol = result["protocol"]
    step = "" if result["step"] is None else f", step {result['step']}"
    rows = [
        [
            f"{domain}, {name}",
            _format(arm["nats_per_token"]),
            _format(arm["entropy"]),
            f"{arm['repeats']['value']:.1%}",
        ]
        for domain, metrics in domains.items()
        for name, arm in metrics["arms"].items()
    ]
    title = (
        f"{protocol['continuation']} tokens after {protocol['prefix']} of held-out text{step}: the"
        " real ones, and the model's own"
    )
    console.print(build_table(title, ["", "nats/token", "entropy", "repeated 4-grams"], rows))


def _print_gaps(domains: dict[str, Any]) -> None:
    rows = [
        [
            domain,
            f"{metrics['continuations']:,}",
            *(_format(metrics[key], "+") for key in ("gap", "miscalibration", "drift")),
        ]
        for domain, metrics in domains.items()
    ]
    title = "gap, real - sampled = miscalibration + drift, nats/token"
    headings = ["", "continuations", "gap", "miscalibration", "drift"]
    console.print(build_table(title, headings, rows))


def _print_positions(result: dict[str, Any]) -> None:
    rows = []
    for row in result["by_position"]:
        first, last = row["from"], row["to"]
        rows.append(
            [
                f"{first}" if first == last else f"{first} to {last}",
                *(f"{row[arm]['value']:.3f}" for arm in ARMS),
                *(_format(row[key], "+") for key in ("gap", "drift")),
            ]
        )
    title = "nats/token by position in the continuation"
    console.print(build_table(title, ["positions", *ARMS, "gap", "drift"], rows))
