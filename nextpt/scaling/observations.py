"""Runs that scaling laws are fitted to: parameters, training tokens and final loss.

They are read from a CSV file or from run folders.

Conventions: N counts all parameters unless said otherwise, D the training tokens, and compute is C
= 6 N D FLOPs (arXiv 2001.08361, section 2.1). A file that gives compute instead of tokens has D = C
/ (6 N).
"""

from __future__ import annotations

import csv
import difflib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nextpt.base.errors import ScalingError
from nextpt.config import load_config
from nextpt.events import decided_batches, read_events
from nextpt.model import ModelSpec, count

FLOPS_PER_PARAMETER_AND_TOKEN = 6
SAME = 0.01  # relative gap below which two sizes, or two numbers of tokens, are one
COUNTS = ("parameters", "non_embedding_parameters", "matmul_parameters")  # of nextpt.model.Counts


@dataclass(frozen=True)
class Runs:
    """n runs.

    Attributes:
        parameters: N, float64 [n].
        tokens: D, float64 [n].
        loss: float64 [n], in `loss_unit`.
        labels: Names of the runs for messages.
        convention: How parameters were counted and where tokens come from.
        unique_tokens: D without repetition, float64 [n], where known.
        loss_unit: For axes and messages. A column of a file may hold any, bits per byte for
            example.
    """

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    labels: list[str]
    convention: str
    unique_tokens: np.ndarray | None = None
    loss_unit: str = "nats per token"

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def flops(self) -> np.ndarray:
        """Training compute C = 6 N D, FLOPs, [n]."""
        return np.asarray(FLOPS_PER_PARAMETER_AND_TOKEN * self.parameters * self.tokens)

    def only(self, kept: np.ndarray) -> Runs:
        """Return the runs of a mask or of an array of indices."""
        labels = [self.labels[i] for i in np.arange(len(self))[kept]]
        unique = None if self.unique_tokens is None else self.unique_tokens[kept]
        return replace(
            self,
            parameters=self.parameters[kept],
            tokens=self.tokens[kept],
            loss=self.loss[kept],
            labels=labels,
            unique_tokens=unique,
        )

    def sizes(self) -> list[np.ndarray]:
        """Return the indices of the runs of each model size, smallest first."""
        return clusters(self.parameters, SAME)


def clusters(values: np.ndarray, tolerance: float) -> list[np.ndarray]:
    """Return indices of values in groups with relative gaps of at most `tolerance`, sorted."""
    order = np.argsort(values, kind="stable")
    gaps = np.flatnonzero(np.diff(np.log(values[order])) > math.log1p(tolerance))
    return np.split(order, gaps + 1)


def drop_highest_losses(runs: Runs, number: int) -> Runs:
    """Leave out the runs with the `number` highest losses, and ties of the last of them."""
    if number == 0:
        return runs
    if number >= len(runs):
        raise ScalingError(f"--drop-highest {number} leaves none of {len(runs)} runs")
    return runs.only(runs.loss < np.sort(runs.loss)[-number])


def read_csv(
    path: Path,
    *,
    parameters: str,
    loss: str,
    tokens: str | None = None,
    flops: str | None = None,
    unique_tokens: str | None = None,
) -> Runs:
    """Read the runs of a CSV file with a header.

    Args:
        path: The file.
        parameters: Column of N.
        loss: Column of the loss, in any unit.
        tokens: Column of D; exactly one of tokens and flops must be given.
        flops: Column of C, FLOPs.
        unique_tokens: Column of the unique tokens.

    Raises:
        ScalingError: Names the file, the line and the column.
    """
    if (tokens is None) == (flops is None):
        raise ScalingError(
            "give either --tokens-column or --flops-column: tokens, or compute in FLOPs from which"
            " D = C / (6 N)"
        )
    columns = {
        "parameters": parameters,
        "tokens": tokens or flops,
        "loss": loss,
        "unique tokens": unique_tokens,
    }
    header, rows = _rows(path)
    for column in columns.values():
        if column is not None and column not in header:
            near = difflib.get_close_matches(
                column, header, n=1, cutoff=0.4
            ) or difflib.get_close_matches(
                column.lower(), [name.lower() for name in header], n=1, cutoff=0.4
            )
            near = [name for name in header if name.lower() == near[0].lower()] if near else []
            raise ScalingError(
                f"{path} has no column {column!r}; "
                + (f"the nearest is {near[0]!r}" if near else f"it has {', '.join(header)}")
            )
    read = {
        quantity: np.array([_number(path, line, row, column, quantity) for line, row in rows])
        for quantity, column in columns.items()
        if column is not None
    }
    if flops is not None:
        read["tokens"] /= FLOPS_PER_PARAMETER_AND_TOKEN * read["parameters"]
    return Runs(
        read["parameters"],
        read["tokens"],
        read["loss"],
        [f"line {line}" for line, _ in rows],
        f"N as in column {parameters!r}; "
        + (f"D as in column {tokens!r}" if tokens else f"D = C / (6 N), C as in column {flops!r}"),
        read.get("unique tokens"),
        f"as in column {loss!r}",
    )


def _rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the header, and each row with the number of its last line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
            header = list(reader.fieldnames or [])
    except OSError as error:
        raise ScalingError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ScalingError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise ScalingError(
            f"{path} has several columns named {', '.join(map(repr, repeated))}; rename them"
        )
    if not rows:
        raise ScalingError(
            f"{path} holds no runs: a header with names of columns is expected, then one run a line"
        )
    return header, rows


def _number(path: Path, line: int, row: dict[str, str], column: str, quantity: str) -> float:
    text = row[column]
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise ScalingError(
            f"{path} line {line}: {column} = {text!r}; {quantity} must be a finite number above 0 "
            "(remove the line of a run that failed)"
        )
    return value


def read_run_folders(
    folders: list[Path], counted: str = "parameters", *, curves: bool = False
) -> Runs:
    """Read finished runs of nextpt: N, D and the validation loss after the last step.

    Args:
        folders: Run folders.
        counted: What N counts, one of COUNTS.
        curves: Read every validation of each run, not only the last; runs may be unfinished.

    Raises:
        ScalingError: A folder is no run, or has no (last) validation.
    """
    points = []
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            raise ScalingError(f"{folder} is not a run folder: it has no config.yaml")
        config = load_config(folder / "config.yaml", warn_deprecated=False)
        records = read_events(folder / "metrics.jsonl")
        events = [record for record in records if record["kind"] == "validation"]
        if not events:
            raise ScalingError(
                f"{folder} has no validation in metrics.jsonl; train with validation.every_steps"
            )
        batches = decided_batches(config.batches, records)
        if not curves and events[-1]["step"] < (total := config.total_steps_with(batches)):
            raise ScalingError(
                f"{folder} is not finished: its last validation is of step {events[-1]['step']:,}"
                f" of {total:,}; a loss before the learning rate has decayed belongs"
                " to another law"
            )
        for event in events if curves else events[-1:]:
            points.append(
                (
                    getattr(
                        count(
                            ModelSpec.from_config(config),
                            config.data.sequence_length,
                        ),
                        counted,
                    ),
                    event["tokens"],
                    event["total"]["nats_per_token"],
                    f"{folder} step {event['step']}",
                )
            )
    for *_, loss, label in points:
        if not (loss > 0 and math.isfinite(loss)):
            raise ScalingError(
                f"{label}: the held-out loss is {loss}; leave out runs that diverged"
            )
    parameters, tokens, losses = (
        np.array([point[column] for point in points], dtype=float) for column in range(3)
    )
    return Runs(
        parameters,
        tokens,
        losses,
        [label for *_, label in points],
        f"N: {counted.replace('_', ' ')}; D: tokens trained on; held-out nats per token",
    )
