"""HTML report about one run or several: plots, tables, samples, config, checkpoints.

The page is one file and opens from disk without network; its Content-Security-Policy forbids it any
request.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import humanize
from jinja2 import Environment

import nextpt
from nextpt.base.errors import DataError
from nextpt.base.files import atomic_write
from nextpt.base.pages import page_environment
from nextpt.config import flatten, to_yaml
from nextpt.observe.curves import report_plots
from nextpt.observe.run_record import RunRecord, read_runs


def default_output(folders: list[Path]) -> Path:
    """Return RUN/report.html of one run; of several, report.html beside the first."""
    return (
        folders[0] / "report.html"
        if len(folders) == 1
        else folders[0].resolve().parent / "report.html"
    )


def write_report(folders: list[Path], output: Path) -> None:
    """Write the page.

    Raises:
        DataError: A folder is not a run, or the file cannot be written.
    """
    runs = read_runs(folders)
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=", ".join(run.label for run in runs),
            runs=runs,
            plots=report_plots(runs),
            differences=config_differences(runs),
            configs={run.label: to_yaml(run.config) for run in runs},
            version=nextpt.__version__,
            now=time.time(),
            validation=validation_rows(runs),
        )
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as file:
            file.write(page)
    except OSError as error:
        raise DataError(f"{output} cannot be written: {error.strerror}") from error


def config_differences(runs: list[RunRecord]) -> list[tuple[str, list[Any]]]:
    """Return (key, value in each run) of the keys that differ, without names and folders."""
    flat = [flatten(run.config.model_dump(mode="json")) for run in runs]
    keys = sorted(set().union(*flat) - {"run.name", "run.dir"})
    rows = [(key, [f.get(key, "-") for f in flat]) for key in keys]
    return [(key, values) for key, values in rows if len({str(value) for value in values}) > 1]


def validation_rows(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """Return validation metrics as rows, one per run, step, average of the weights and domain.

    `weights` is empty for the weights that are trained.
    """
    return [
        {"run": run.label, "step": e["step"], "tokens": e["tokens"]}
        | {"weights": weights, "domain": domain}
        | metrics
        for run in runs
        for e in run.validation
        for weights, by_domain in {"": e, **e.get("averages", {})}.items()
        for domain, metrics in by_domain["domains"].items()
    ]


def environment() -> Environment:
    """Return the template environment of all pages: escaping, readable numbers and times."""
    templates = page_environment("nextpt.observe")
    templates.filters["short"] = humanize.metric
    return templates
