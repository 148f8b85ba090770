"""User errors about hosts are reported before any rank starts.

In a separate module, since a machine can run one set of hosts at a time.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.test_hosts import config, require, start
from tests.support.net_hosts import hosts

pytestmark = pytest.mark.slow


def test_user_errors_are_reported_before_any_rank_starts(dataset: Path, tmp_path: Path) -> None:
    require()
    hidden, other = tmp_path / "hidden", tmp_path / "other" / "numpy-9.9.dist-info"
    hidden.mkdir()
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.9\n")
    with hosts(
        tmp_path / "hosts", 3, hidden={"h2": hidden}, variables={"h3": f"PYTHONPATH={other.parent}"}
    ) as network:
        cases = {
            ("h1", "h2"): f"host h2 does not see the run folder {hidden}/run of this machine",
            ("h1", "h3"): "host h3 has numpy 9.9 and others have",
            ("h1", "nobody"): "host nobody: not reachable by ssh",
        }
        for names, message in cases.items():
            (tmp_path / "output").unlink(missing_ok=True)
            code = start(
                network, network.hostfile(1, *names), config(dataset, hidden / "run"), tmp_path
            ).wait(600)
            output = (tmp_path / "output").read_text()
            assert (
                code == 2
                and output.count("\n") == 1
                and output.startswith("error: ")
                and message in output
            ), output
        assert (
            start(
                network, network.hostfile(7, "h1"), config(dataset, hidden / "run"), tmp_path
            ).wait(600)
            == 2
        )
        assert (
            "is not a multiple of train.micro_batch_size x ranks = 2 x 7"
            in (tmp_path / "output").read_text()
        )
        assert not list((hidden / "run").iterdir())
