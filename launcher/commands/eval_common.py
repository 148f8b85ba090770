"""What the commands of `nextpt eval` share: the model and the texts it is scored on, and where the figures go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.console import say

if TYPE_CHECKING:
    from nextpt.evaluate.source import Source


def open_with_texts(
    path: Path,
    step: int | None,
    data: Path | None,
    text: list[Path] | None,
    *,
    decoder_only: bool = False,
) -> tuple[Source, dict[str, list[str]]]:
    """The model of a run or Hugging Face folder, and domain -> documents: those of `text`, of the dataset `data`, or of the run's own.

    Raises CheckpointError and DataError.
    """
    from nextpt.evaluate.heldout import heldout_texts, text_files
    from nextpt.evaluate.source import open_source
    from nextpt.generate import pick_device

    # Mistakes before the model is read
    texts = text_files(text) if text else heldout_texts(data) if data else None
    source = open_source(path, step, pick_device(), decoder_only=decoder_only)
    return source, texts or heldout_texts(Path(source.config.data.path))


def deliver(
    result: dict[str, Any],
    json_paths: list[Path | None],
    plot: Path | None,
    draw: Callable[[Path], None],
) -> None:
    """Write the figures to the files that are given, and draw them where a picture is asked for.

    Raises DataError.
    """
    from nextpt.evaluate.heldout import write_result

    for path in filter(None, json_paths):
        write_result(result, path)
        say(f"written to {path}")
    if plot:
        draw(plot)
        say(f"drawn in {plot}")
