"""A real Slurm of two daemons on this machine, shared by the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.slurm_cluster import Slurm, missing, slurm


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if lacking := missing():
        assert "NEXTPT_REQUIRE_ALL" not in os.environ, lacking
        pytest.skip(lacking)
    with slurm(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running
