"""The picture of an ablation: what each variant changes, by domain."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nextpt.errors import DataError
from nextpt.observe.curves import COLOURS, SETTINGS
from nextpt.observe.evaluation_picture import whiskers


def draw_ablation(result: dict[str, Any], path: Path) -> None:
    """Draw what `nextpt ablate` writes: means over seeds with 95 % intervals from documents, and the seeds as small points. Raises DataError."""
    variants, domains = result["variants"], list(result["baseline"]["domains"])
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(2.5 + 1.8 * len(domains), 4), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="0.6", linewidth=1)
        for number, (colour, (name, variant)) in enumerate(zip(itertools.cycle(COLOURS), variants.items(), strict=False)):
            x = [place + 0.6 * ((number + 0.5) / len(variants) - 0.5) for place in range(len(domains))]
            of = [variant["domains"][domain] for domain in domains]
            values = [one["difference"] for one in of]
            axes.errorbar(x, values, yerr=whiskers(values, [one["interval"] for one in of]), marker="o", markersize=5, capsize=3, linestyle="none",
                          color=colour, label=name)
            if len(result["seeds"]) > 1:
                axes.plot([at for at, one in zip(x, of, strict=True) for _ in one["by_seed"]], [d for one in of for d in one["by_seed"]], marker=".",
                          markersize=4, linestyle="none", color="0.3")
        axes.set_xticks(range(len(domains)), [f"{d}\n({result['baseline']['domains'][d]['bpb_text']:.3f})" for d in domains])
        axes.set(xlabel=f"domain (bits per byte of {result['baseline']['name']})", ylabel="change, bits per byte")
        axes.margins(x=0.1)
        axes.legend(fontsize=8)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error
