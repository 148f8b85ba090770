"""Values of options that several commands share."""

from __future__ import annotations

import pytest

from launcher.options import parse_sizes
from nextpt.base.errors import ConfigError


def test_sizes_are_sorted_and_each_comes_once() -> None:
    assert parse_sizes("--prefixes", "64, 16,64") == [16, 64]


@pytest.mark.parametrize("text", ["", "16,", "0,16", "-1", "1.5", "16 32"])
def test_sizes_are_whole_numbers_above_0(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--prefixes .*: expected whole numbers above 0"):
        parse_sizes("--prefixes", text)
