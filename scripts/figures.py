"""Measured figures that several pages name, from one file: docs/figures.yaml.

    python scripts/figures.py            write the figures into the pages
    python scripts/figures.py --check    exit with 1 where a page says something else

A page has texts with the names of figures in braces. The page must have each of these texts once,
with some number in each place.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "docs" / "figures.yaml"
NUMBER = r"\d[\d.,]*"


def update(page: str, texts: list[str], figures: dict[str, str]) -> str:
    """Put the figures into the texts of a page.

    Raises:
        ValueError: The page does not have one of the texts, or has it twice.
        KeyError: A text names no figure.
    """
    for text in texts:
        parts = re.split(r"\{(\w+)\}", text)
        pattern = "".join(
            NUMBER if number % 2 else re.escape(part) for number, part in enumerate(parts)
        )
        if (count := len(re.findall(pattern, page))) != 1:
            raise ValueError(f"this text is there {count} times and not once: {text!r}")
        current = text.format_map(figures)
        page = re.sub(pattern, lambda _, current=current: current, page)
    return page


def main() -> int:
    """Write or check the pages; returns the exit code."""
    content = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    figures = {name: figure["value"] for name, figure in content["figures"].items()}
    check, code = "--check" in sys.argv[1:], 0
    for name, texts in content["pages"].items():
        page = ROOT / name
        before = page.read_text(encoding="utf-8")
        try:
            after = update(before, texts, figures)
        except (ValueError, KeyError) as error:
            print(f"error: {name}: {error}; see {SOURCE.relative_to(ROOT)}")
            code = 1
            continue
        if after == before:
            continue
        if check:
            source = SOURCE.relative_to(ROOT)
            print(f"error: {name} has other figures than {source}; run: make figures")
            code = 1
        else:
            page.write_text(after, encoding="utf-8")
            print(f"written to {name}")
    return code


if __name__ == "__main__":
    sys.exit(main())
