"""Refusals of a job because of the hosts of its ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextpt.base.errors import ConfigError
from nextpt.train.startup_checks import check_hpz
from tests.support.datasets import tiny


def test_hpz_gathers_on_one_host() -> None:
    pairs = tiny(Path("."), Path("."), train={"zero_stage": 3, "hpz_ranks": 2})
    check_hpz(pairs, ["h1"] * 2 + ["h2"] * 4)
    check_hpz(tiny(Path("."), Path(".")), ["h1", "h2"])
    with pytest.raises(
        ConfigError, match=r"train.hpz_ranks = 2: ranks 2 to 3 are on different hosts \(h1, h2\)"
    ):
        check_hpz(pairs, ["h1"] * 3 + ["h2"] * 3)
    # Assigned one host after the other
    with pytest.raises(ConfigError, match=r"ranks 0 to 1 are on different hosts"):
        check_hpz(pairs, ["h1", "h2", "h1", "h2"])
