"""One HTML page about one run or several: pictures, tables, samples, config, environment, checkpoints.

The page is one file and opens from disk without network; its Content-Security-Policy forbids it any request.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import nextpt
from data_prep.files import atomic_write
from nextpt.config import flatten, to_yaml
from nextpt.errors import DataError
from nextpt.observe.curves import pictures
from nextpt.observe.run_record import RunRecord, read_runs


def default_output(folders: list[Path]) -> Path:
    """RUN/report.html of one run; of several, report.html beside the first."""
    return folders[0] / "report.html" if len(folders) == 1 else folders[0].resolve().parent / "report.html"


def write_report(folders: list[Path], output: Path) -> None:
    """Write the page. Raises DataError for a folder that is not a run, or a file that cannot be written."""
    runs = read_runs(folders)
    page = _environment().get_template("report.html.j2").render(
        title=", ".join(run.label for run in runs), runs=runs, pictures=pictures(runs), differences=config_differences(runs),
        configs={run.label: to_yaml(run.config) for run in runs}, version=nextpt.__version__, now=time.time(),
        heldout=heldout_rows(runs),
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as file:
            file.write(page)
    except OSError as error:
        raise DataError(f"{output} cannot be written: {error.strerror}") from error


def config_differences(runs: list[RunRecord]) -> list[tuple[str, list[Any]]]:
    """(key, value in each run) of the keys in which the runs differ, their names and folders left out."""
    flat = [flatten(run.config.model_dump(mode="json")) for run in runs]
    keys = sorted(set().union(*flat) - {"run.name", "run.dir"})
    rows = [(key, [f.get(key, "-") for f in flat]) for key in keys]
    return [(key, values) for key, values in rows if len({str(value) for value in values}) > 1]


def heldout_rows(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """Validation figures as a table: one row per run, step and domain."""
    return [{"run": run.label, "step": e["step"], "tokens": e["tokens"], "domain": name} | figures
            for run in runs for e in run.validation for name, figures in e["domains"].items()]


def _environment() -> Environment:
    environment = Environment(loader=PackageLoader("nextpt.observe", "."), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": lambda n: f"{n:,}", "size": readable_bytes, "date": readable_time, "duration": readable_duration,
                            "short": readable_count}
    return environment


def readable_bytes(size: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def readable_count(number: float) -> str:
    """1234567 -> 1.23M."""
    for unit in ("", "K", "M", "B", "T"):
        if abs(number) < 999.5 or unit == "T":
            return f"{number:.0f}" if unit == "" else f"{number:.3g}{unit}"
        number /= 1000
    raise AssertionError


def readable_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def readable_duration(seconds: float) -> str:
    """3725 -> 1 h 2 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{seconds / 86400:.1f} days"
