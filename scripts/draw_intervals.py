"""Draws docs/attention.svg: what a tile of queries reads.

`python scripts/draw_intervals.py`, from the repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from kernels.attention.intervals import Slices, of_documents  # noqa: E402

TILE, LENGTHS = 4, (9, 5, 18)
COLOURS = {"read, with a mask": "#f4b183", "read whole": "#9dc3e6", "not read": "#f2f2f2"}


def kind_of(block: torch.Tensor) -> str:
    """How a block of scores is treated, from the mask inside it."""
    return (
        "read whole"
        if bool(block.all())
        else "read, with a mask"
        if bool(block.any())
        else "not read"
    )


def draw(axes, title: str, window: int | None) -> None:
    """Draw the blocks of scores that are read, masked and skipped."""
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).unsqueeze(0)
    mask = of_documents(ids, Slices.of(ids.shape[1], ids.shape[1]), window).mask()[0, 0]
    size = mask.shape[0]
    for q in range(0, size, TILE):
        for k in range(0, size, TILE):
            colour = COLOURS[kind_of(mask[q : q + TILE, k : k + TILE])]
            axes.add_patch(
                Rectangle((k, q), TILE, TILE, facecolor=colour, edgecolor="white", linewidth=1.5)
            )
    for query, row in enumerate(mask):
        columns = row.nonzero().flatten()
        axes.plot(
            [int(columns[0]), int(columns[-1]) + 1],
            [query + 0.5] * 2,
            color="#1f4e79",
            linewidth=2,
            solid_capstyle="butt",
        )
    axes.set(
        xlim=(0, size), ylim=(size, 0), xlabel="keys", ylabel="queries", title=title, aspect="equal"
    )


def main() -> None:
    """Write docs/attention.svg."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    draw(panels[0], f"documents of {', '.join(map(str, LENGTHS))} tokens", None)
    draw(panels[1], "the same with a window of 6", 6)
    figure.legend(
        handles=[Patch(color=c, label=name) for name, c in COLOURS.items()],
        loc="outside lower center",
        ncols=3,
    )
    figure.savefig(ROOT / "docs" / "attention.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
