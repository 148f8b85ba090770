"""The commands of docs/clusters.md, in order, on a real Slurm and on hosts with sshd."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.test_hosts import require
from tests.cluster.test_slurm import losses
from tests.support import net_hosts
from tests.support.slurm_cluster import Slurm

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "clusters.md"
NOT_RUN = {"make setup": "the tests run in what it made"}
BLOCK_SECONDS = 1500


@dataclass(frozen=True)
class World:
    """A folder that looks like a checkout, and the environment of its user."""

    folder: Path
    environment: dict[str, str]

    def follow(self, section: str) -> list[str]:
        """Run the commands of a section, each block in one shell.

        Returns what each block printed.
        """
        return [self._run(block) for block in blocks(section)]

    def _run(self, block: str) -> str:
        commands = "\n".join(line for line in block.splitlines() if line not in NOT_RUN)
        completed = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BLOCK_SECONDS,
        )
        assert completed.returncode == 0, f"{commands}\n{completed.stdout[-3000:]}"
        return completed.stdout

    def end(self, run: str) -> dict:
        return json.loads((self.folder / "runs" / run / "exit.json").read_text())


def sections() -> dict[str, str]:
    """Heading -> text below it; the text before the first heading is under ""."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(section: str) -> list[str]:
    """The indented blocks of a section."""
    indented = re.findall(r"(?:^    .+\n)+", sections()[section], flags=re.MULTILINE)
    return ["\n".join(line[4:] for line in block.splitlines()) for block in indented]


@pytest.fixture(scope="module")
def world(cluster: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    require("pdsh")
    folder = tmp_path_factory.mktemp("checkout")
    for name in (
        ".venv",
        "configs",
        "data_prep",
        "kernels",
        "launcher",
        "nextpt",
        "pyproject.toml",
    ):
        (folder / name).symlink_to(ROOT / name)
    machines = tmp_path_factory.mktemp("machines") / "hosts"
    with net_hosts.hosts(machines, 2, prefix="node") as hosts:
        variables = cluster.variables | hosts.variables | {"OMP_NUM_THREADS": "1"}
        network = World(folder, os.environ | variables)
        network.follow("")
        yield network


def test_every_section_with_commands_is_followed() -> None:
    followed = {"", "Slurm", "A hostfile", "deepspeed", "When it hangs"}
    assert {name for name in sections() if blocks(name)} == followed
    assert set(NOT_RUN) <= {
        line for name in followed for block in blocks(name) for line in block.splitlines()
    }


def test_slurm(world: World) -> None:
    submitted, watched, requeued, finished = world.follow("Slurm")
    assert re.match(r"job \d+: 2 nodes x 1 ranks", submitted)
    assert "by-slurm" in watched and "loss" in watched
    assert json.loads(requeued)["code"] == 75
    assert json.loads(finished)["code"] == 0 and world.end("by-slurm")["code"] == 0
    assert list(losses(world.folder / "runs/by-slurm")) == list(range(1, 41))


def test_the_hostfile(world: World) -> None:
    first, second = world.follow("A hostfile")
    assert "node1" in first and "node2" in first
    assert json.loads(second[second.rindex("{") :])["code"] == 0
    assert losses(world.folder / "runs/by-hosts") == losses(world.folder / "runs/by-slurm")


def test_deepspeed(world: World) -> None:
    (output,) = world.follow("deepspeed")
    assert json.loads(output[output.rindex("{") :])["code"] == 0
    assert losses(world.folder / "runs/by-deepspeed") == losses(world.folder / "runs/by-slurm")


def test_a_hang_is_diagnosed_as_described(world: World) -> None:
    (output,) = world.follow("When it hangs")
    end = world.end("hanging")
    assert end["code"] == 76 and "rank 1" in end["reason"] and "node2" in end["reason"], output
    assert "rank 1" in output[output.index("}") :] and "node2" in output
    assert "File " in (world.folder / "runs/hanging/stacks/rank-0.txt").read_text()
    assert not (world.folder / "runs/hanging/stacks/rank-1.txt").exists()
