"""Style of all plots, and their files: palette, matplotlib settings, formats, writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextpt.base.errors import UserError

FORMATS = (".png", ".svg", ".pdf")
# Palette of Okabe and Ito: distinguishable with colour blindness and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
BLUE, ORANGE = COLOURS[:2]
GREY = "#777777"
SETTINGS: dict[Any, Any] = {  # keys are literal types of matplotlib
    "svg.hashsalt": "nextpt",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def check_plot_path(path: Path) -> None:
    """Raise UserError for a plot whose suffix is no format or whose folder does not exist."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path} must end in {', '.join(FORMATS)}, the format of the plot")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path} cannot be written: folder {path.absolute().parent} does not exist")


LONGEST_IN_COLUMNS = 36  # characters of a legend's label
LEGEND_ROW, AXES_HEIGHT = 0.17, 3.4  # inches; of axes with their title and labels


def set_title(figure: Figure, title: str) -> None:
    """Put the title of a whole figure above its left end."""
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)


def legend_below(axes: Axes, columns: int = 2) -> None:
    """Put the legend below the axes, where it covers no curve; for figures in constrained layout.

    The figure becomes higher for many labels, so that the axes keep their size.

    Args:
        axes: With labelled artists.
        columns: Largest number of columns; long labels have one.
    """
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    fitting = columns if max(map(len, labels)) <= LONGEST_IN_COLUMNS else 1
    used = min(fitting, len(labels))
    rows = -(-len(labels) // used)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(max(figure.get_figheight(), AXES_HEIGHT + LEGEND_ROW * rows))
    axes.legend(fontsize=8, ncols=used, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix; as SVG, equal figures give equal bytes.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
