"""Output of the commands in terminals of any width."""

from __future__ import annotations

import io

import pytest
from rich.table import Table

from launcher.console import WideTableConsole, build_table


def printed(width: int, table: Table) -> list[str]:
    console = WideTableConsole(highlight=False, soft_wrap=True, width=width, file=io.StringIO())
    console.print(table)
    assert console.width == width
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [20, 80, 300])
def test_no_heading_or_number_is_cut(width: int) -> None:
    lines = printed(
        width,
        build_table(
            "title",
            ["", *(f"heading {i}" for i in range(12))],
            [["row of a name", *(f"{10**i:,}" for i in range(12))]],
        ),
    )
    output = "\n".join(lines)
    assert "…" not in output and all(
        f"heading {i}" in output and f" {10**i:,}" in output for i in range(12)
    )


def test_text_is_folded_first() -> None:
    table = Table()
    table.add_column("what", overflow="fold")
    table.add_column("figure", no_wrap=True)
    table.add_row("word " * 100, "123,456,789")
    lines = printed(40, table)
    assert max(map(len, lines)) <= 40 and any("123,456,789" in line for line in lines)
