"""`nextpt ablate`: train a baseline and variants, compare their bits per byte per domain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.console import build_table, console, echo, format_interval
from launcher.options import Ranks
from launcher.registration import add_command

AblationFile = Annotated[
    Path,
    typer.Argument(
        metavar="ABLATION.yaml",
        help="base config, baseline, variants and seeds; see docs/ablation.md",
    ),
]


def ablate(file: AblationFile, ranks: Ranks = None) -> None:
    """Train a baseline and variants with several seeds and compare their held-out loss.

    All runs are scored as `nextpt eval` scores them. DIR/ablation.json has the metrics and the
    config keys that differ, DIR/ablation.png the plot. A finished run is not trained or scored
    again: the same command continues after an interruption.
    """
    from launcher.jobs.run_set import train_run
    from nextpt.generate import pick_device
    from nextpt.scaling.ablation import is_done, load_ablation
    from nextpt.scaling.ablation_plot import plot_ablation
    from nextpt.scaling.ablation_result import SUMS, ValidationDocuments, result_of, score_run
    from nextpt.scaling.record import write_json

    ablation = load_ablation(file)
    documents, runs, scores = ValidationDocuments.of(ablation.data), ablation.runs(), {}
    for number, run in enumerate(runs, 1):
        if not is_done(ablation, run):
            train_run(ablation, run, f"run {number}/{len(runs)}", ranks)
        folder = ablation.folder(run)
        if not (folder / SUMS).exists():
            count = sum(map(len, documents.texts.values()))
            echo(f"scoring {run.name} on {count:,} held-out documents")
        scores[run.name] = score_run(folder, ablation.last_step(run), documents, pick_device())
    result = result_of(ablation, documents, scores)
    _print_result(result)
    write_json(result, ablation.dir / "ablation.json")
    plot_ablation(result, ablation.dir / "ablation.png")
    echo(f"written to {ablation.dir / 'ablation.json'}, plotted in {ablation.dir / 'ablation.png'}")


def _print_result(result: dict[str, Any]) -> None:
    seeds, intervals = result["seeds"], result["protocol"]["intervals"]
    _print_baseline(result)
    for variant in result["variants"]:
        _print_variant(variant)
    echo(
        f"\ndifference: from {result['baseline']['name']} with the same seed, mean over seeds;"
        " below 0 is better"
    )
    echo(
        f"95 %: paired bootstrap of documents, {intervals['resamples']} resamples, seed"
        f" {intervals['seed']}: the variation over documents for these trained models"
    )
    if len(seeds) > 1:
        echo("seeds: lowest to highest over seeds: the variation over trainings on these documents")


def _print_baseline(result: dict[str, Any]) -> None:
    baseline, seeds = result["baseline"], len(result["seeds"])
    rows = [
        [
            domain,
            f"{metrics['documents']:,}",
            f"{metrics['bytes']:,}",
            f"{metrics['bpb']:.4f}",
            format_interval(metrics["interval"], ".4f"),
            _seed_range(metrics, ".4f"),
        ]
        for domain, metrics in _domains_and_total(baseline)
    ]
    title = (
        f"{baseline['name']}: bits per byte, step {result['step']:,}, mean of {seeds}"
        f" seed{'s' if seeds > 1 else ''}"
    )
    headings = ["domain", "documents", "bytes", "bits/byte", "95 %", "seeds"]
    console.print(build_table(title, headings, rows))


def _print_variant(variant: dict[str, Any]) -> None:
    rows = [
        [
            domain,
            f"{metrics['bpb']:.4f}",
            f"{metrics['difference']:+.4f}",
            format_interval(metrics["interval"], "+.4f"),
            _seed_range(metrics, "+.4f"),
        ]
        for domain, metrics in _domains_and_total(variant)
    ]
    changes = ", ".join(
        f"{key} {_format_value(before)} -> {_format_value(after)}"
        for key, (before, after) in variant["changes"].items()
    )
    headings = ["domain", "bits/byte", "difference", "95 %", "seeds"]
    console.print(build_table(f"{variant['name']}: {changes}", headings, rows))


def _domains_and_total(model: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [*model["domains"].items(), ("total", model["total"])]


def _format_value(value: Any) -> str:
    return "unset" if value is None else str(value)


def _seed_range(metrics: dict[str, Any], spec: str) -> str:
    values = metrics["by_seed"]
    return format_interval([min(values), max(values)], spec) if len(values) > 1 else ""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app, "ablate", ablate, example="nextpt ablate configs/ablations/code-weight.yaml --ranks 2"
    )
