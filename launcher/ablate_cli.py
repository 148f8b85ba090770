"""`nextpt ablate`: what a change of config does to each domain, measured on runs that differ in nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.console import out, say, shares_progress, small_table
from launcher.sweep import train_run

EXAMPLE = "example: nextpt ablate configs/ablations/code-weight.yaml --ranks 2"


def ablate(
    file: Annotated[Path, typer.Argument(metavar="ABLATION.yaml", help="base config, seeds, baseline and variants; see docs/ablation.md")],
    ranks: Annotated[int | None, typer.Option(min=1, help="processes of each run; one per GPU, or 1 without, unless given")] = None,
    plot: Annotated[Path | None, typer.Option(help="picture to draw; DIR/ablation.svg unless given")] = None,
) -> None:
    """Train a baseline and its variants, and tell the difference in bits per byte of each domain, with intervals.

    What is finished is not trained again: the same command goes on after an interruption.
    """
    from nextpt.evaluate.heldout import write_result
    from nextpt.observe.ablation_picture import draw_ablation
    from nextpt.observe.evaluation_picture import check_picture
    from nextpt.scaling.ablation import compare, heldout_of, load_ablation, score_run
    from nextpt.scaling.runs import is_done

    ablation = load_ablation(file)
    if plot:
        check_picture(plot)
    texts = heldout_of(ablation)
    for number, run in enumerate(ablation.all):
        if not is_done(ablation, run):
            train_run(ablation, run, f"run {number + 1}/{len(ablation.all)}", ranks)
    scored = {}
    for run in ablation.all:
        with shares_progress(f"evaluating {run.name},") as progress:
            scored[run.name] = score_run(ablation.folder(run), texts, progress)
    result = compare(ablation, scored, texts)
    _show(result)
    write_result(result, ablation.dir / "ablation.json")
    draw_ablation(result, plot or ablation.dir / "ablation.svg")
    say(f"written to {ablation.dir / 'ablation.json'}, drawn in {plot or ablation.dir / 'ablation.svg'}")


def _show(result: dict[str, Any]) -> None:
    base = result["baseline"]
    domains = list(base["domains"])
    rows = [[f"{base['name']} (baseline)", *(f"{of['bpb_text']:.4f}" for of in base["domains"].values())]]
    for name, variant in result["variants"].items():
        rows.append([name, *(_cell(of) for of in variant["domains"].values())])
        if len(result["seeds"]) > 1:
            rows.append(["  by seed", *("  ".join(f"{d:+.4f}" for d in of["by_seed"]) for of in variant["domains"].values())])
    out.print(small_table("bits per byte of held-out text, and what each variant changes", ["", *domains], rows))
    spread = ", ".join(f"{d} {max(of['by_seed']) - min(of['by_seed']):.4f}" for d, of in base["domains"].items())
    if len(result["seeds"]) > 1:
        say(f"the baseline itself, from seed to seed (largest - smallest): {spread}")
    say(f"brackets: {result['intervals']['confidence']:.0%} intervals, paired bootstrap of documents; seeds are not in them")


def _cell(of: dict[str, Any]) -> str:
    return f"{of['difference']:+.4f}" + (" [{:+.4f}, {:+.4f}]".format(*of["interval"]) if of["interval"] else "")
