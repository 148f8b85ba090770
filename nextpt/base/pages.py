"""HTML pages from Jinja templates: escaping, and how numbers, sizes and times read."""

from __future__ import annotations

import time
from functools import partial

import humanize
from jinja2 import Environment, PackageLoader, StrictUndefined


def page_environment(package: str) -> Environment:
    """Return the environment of the templates of a package; text is escaped.

    Filters: count (1,234), size (1.2 MiB), date (local time) and duration (5 minutes).
    """
    environment = Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda n: f"{n:,}",
        "size": partial(humanize.naturalsize, binary=True),
        "date": readable_time,
        "duration": readable_duration,
    }
    return environment


def readable_time(seconds: float) -> str:
    """Format seconds since the epoch as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def readable_duration(seconds: float) -> str:
    """Format a duration, such as 300 as "5 minutes"."""
    return humanize.precisedelta(
        seconds, minimum_unit="seconds" if seconds < 90 else "minutes", format="%.0f"
    )
