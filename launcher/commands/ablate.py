"""`nextpt ablate`: train a baseline and variants of it, and say how they differ in bits per byte, per domain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.console import out, say, small_table
from launcher.registration import add_command


def ablate(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="ABLATION.yaml",
            help="base config, baseline, variants and seeds; see docs/ablation.md",
        ),
    ],
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="processes of each run; one per GPU, or 1 without, unless given"),
    ] = None,
) -> None:
    """Train a baseline and variants with several seeds, score all on the held-out documents as `nextpt eval` does, and compare.

    DIR/ablation.json has the figures and the keys that differ, DIR/ablation.png the picture. What
    is finished is not trained or scored again: the same command goes on after an interruption.
    """
    from launcher.jobs.run_set import train_one
    from nextpt.generate import pick_device
    from nextpt.scaling.ablation import is_done, load_ablation
    from nextpt.scaling.ablation_picture import draw_ablation
    from nextpt.scaling.ablation_result import SUMS, HeldOut, result_of, score_run
    from nextpt.scaling.record import write_json

    ablation = load_ablation(file)
    heldout, runs, scores = HeldOut.of(ablation.data), ablation.runs(), {}
    for number, run in enumerate(runs, 1):
        if not is_done(ablation, run):
            train_one(ablation, run, f"run {number}/{len(runs)}", ranks)
        folder = ablation.folder(run)
        if not (folder / SUMS).exists():
            say(
                f"scoring {run.name} on {sum(map(len, heldout.texts.values())):,} held-out"
                " documents"
            )
        scores[run.name] = score_run(folder, ablation.config(run).last_step, heldout, pick_device())
    result = result_of(ablation, heldout, scores)
    _show(result)
    write_json(result, ablation.dir / "ablation.json")
    draw_ablation(result, ablation.dir / "ablation.png")
    say(f"written to {ablation.dir / 'ablation.json'}, drawn in {ablation.dir / 'ablation.png'}")


def _show(result: dict[str, Any]) -> None:
    baseline, seeds, p = result["baseline"], result["seeds"], result["protocol"]
    number = f"{len(seeds)} seed" + ("s" if len(seeds) > 1 else "")
    rows = [
        [
            place,
            f"{f['documents']:,}",
            f"{f['bytes']:,}",
            f"{f['bpb']:.4f}",
            _range(f["interval"], ".4f"),
            _seeds(f, ".4f"),
        ]
        for place, f in _places(baseline)
    ]
    out.print(
        small_table(
            f"{baseline['name']}: bits per byte, step {result['step']:,}, mean of {number}",
            ["domain", "documents", "bytes", "bits/byte", "95 %", "seeds"],
            rows,
        )
    )
    for variant in result["variants"]:
        rows = [
            [
                place,
                f"{f['bpb']:.4f}",
                f"{f['difference']:+.4f}",
                _range(f["interval"], "+.4f"),
                _seeds(f, "+.4f"),
            ]
            for place, f in _places(variant)
        ]
        out.print(
            small_table(
                f"{variant['name']}:"
                f" {', '.join(f'{key} {_value(a)} -> {_value(b)}' for key, (a, b) in variant['changes'].items())}",
                ["domain", "bits/byte", "difference", "95 %", "seeds"],
                rows,
            )
        )
    say(
        f"\ndifference: from {baseline['name']} with the same seed, mean over seeds; below 0 is"
        " better"
    )
    say(
        f"95 %: paired bootstrap of documents, {p['intervals']['resamples']} resamples, seed"
        f" {p['intervals']['seed']}: other documents, these trainings"
    )
    if len(seeds) > 1:
        say("seeds: lowest to highest of the seeds' own: these documents, other trainings")


def _places(model: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [*model["domains"].items(), ("total", model["total"])]


def _value(value: Any) -> str:
    return "unset" if value is None else str(value)


def _range(interval: list[float] | None, form: str) -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}" if interval else ""


def _seeds(figures: dict[str, Any], form: str) -> str:
    values = figures["by_seed"]
    return f"{min(values):{form}} to {max(values):{form}}" if len(values) > 1 else ""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app, "ablate", ablate, example="nextpt ablate configs/ablations/code-weight.yaml --ranks 2"
    )
