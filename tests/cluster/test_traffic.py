"""Traffic of a step between hosts against the plan's formula, by ZeRO stage and hpZ."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nextpt.config import Config, to_yaml
from nextpt.scaling import plan
from tests.cluster.test_hosts import require
from tests.support.datasets import tiny
from tests.support.net_hosts import Hosts, hosts
from tests.support.traffic_probe import FIRST_BLOCK

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
MICRO_BATCHES = 2


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require()
    with hosts(tmp_path_factory.mktemp("net") / "hosts", 2) as network:
        yield network


def config(
    ranks: int, stage: int, precision: str, optimizer: str = "adamw", hpz: int | None = None
) -> Config:
    """Matrices too large to stay gathered at stage 3 (DeepSpeed keeps those below 10^5)."""
    return tiny(
        Path("."),
        Path("."),
        model={"vocab_size": 2048, "depth": 3, "width": 384},
        optimizer={"kind": optimizer, "lr": 3e-3},
        train={
            "zero_stage": stage,
            "precision": precision,
            "hpz_ranks": hpz,
            "micro_batch_size": 1,
            "global_batch_size": MICRO_BATCHES * ranks,
        },
    )


def count(
    on: Hosts, configs: list[Config], per_host: int, folder: Path
) -> list[list[dict[str, Any]]]:
    """[config][rank] -> counts of the probe, on two hosts."""
    paths = []
    for number, config in enumerate(configs):
        paths.append(folder / f"{number}.yaml")
        paths[-1].write_text(to_yaml(config))
    world, running = 2 * per_host, []
    for rank in range(world):
        name = on.names[rank // per_host]
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % per_host),
            "WORLD_SIZE": str(world),
            "LOCAL_SIZE": str(per_host),
            "MASTER_ADDR": on.address(on.names[0]),
            "MASTER_PORT": "29401",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [
            sys.executable,
            "-m",
            "tests.support.traffic_probe",
            str(folder / "out"),
            *map(str, paths),
        ]
        running.append(on.start(name, command, environment, folder / f"{rank}.log"))
    codes = [process.wait(1500) for process in running]
    assert not any(codes), "\n".join(p.read_text()[-3000:] for p in folder.glob("*.log"))
    results = [json.loads((folder / f"out-{rank}.json").read_text()) for rank in range(world)]
    return [[result[number] for result in results] for number in range(len(configs))]


def sent(counted: dict[str, Any], ranks: int) -> float:
    """Bytes that a rank sends by ring algorithms in collectives of `ranks` ranks."""
    return sum(
        collective["bytes"] for collective in counted["sent"] if len(collective["ranks"]) == ranks
    )


def test_each_stage_sends_the_planned_traffic(
    two: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "LIVE_PARAMETERS", 1)
    cases = [
        (0, "fp32"),
        (1, "fp32"),
        (1, "bf16"),
        (2, "fp32"),
        (2, "bf16"),
        (3, "fp32"),
        (3, "bf16"),
        (0, "fp32", "muon"),
        (1, "bf16", "muon"),
        (2, "fp32", "muon"),
        (3, "bf16", "muon"),
    ]
    configs = [config(2, *case) for case in cases]
    print(
        "\nstage precision optimizer  MB by the formula  counted in collectives  on the wire "
        " buckets sent before the first backward pass ends"
    )
    for case, run_config, counts in zip(
        cases, configs, count(two, configs, 1, tmp_path), strict=True
    ):
        traffic = plan.traffic(run_config, 2, "cpu")
        exchange = plan.step_cost(run_config, 2, "cpu").sent_bytes
        assert traffic.in_optimizer == max(exchange)
        formula = traffic.everywhere + exchange[0]
        order = counts[0]["order"]
        early = sum(
            kind in ("all_reduce", "reduce_scatter") for kind in order[: order.index(FIRST_BLOCK)]
        )
        print(
            f"{case[0]}     {case[1]} {run_config.optimizer.kind:>9}       {formula / 1e6:10.2f}"
            f" {sent(counts[0], 2) / 1e6:18.2f} {counts[0]['wire'] / 1e6:18.2f} {early:10}"
        )
        # Of some six buckets; stages 0 and 1 reduce after the last backward pass
        assert early >= 3 if case[0] >= 2 else early == 0, order
        # At stage 3 small parameters stay gathered, and so do the first ones of the backward pass.
        least = (0.9 if case[0] == 3 else 1.0) * formula
        assert least <= sent(counts[0], 2) <= formula * 1.0001, case
        exchanged = [
            sum(s["bytes"] for s in rank["sent"] if s["kind"] == "all_to_all") for rank in counts
        ]
        assert exchanged == list(exchange)
        assert sent(counts[0], 2) - exchanged[0] == sent(counts[1], 2) - exchanged[1]
        # gloo sends a reduce-scatter as an all-reduce would, both passes; headers and
        # acknowledgements come on top.
        scattered = sum(s["bytes"] for s in counts[0]["sent"] if s["kind"] == "reduce_scatter")
        assert counts[0]["wire"] == pytest.approx(sent(counts[0], 2) + scattered, rel=0.05), case


def test_hpz_takes_the_gathering_off_the_network(
    two: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "LIVE_PARAMETERS", 1)
    configs = [config(4, 3, "bf16"), config(4, 3, "bf16", hpz=2)]
    plain, hpz = count(two, configs, 2, tmp_path)
    assert plain[0]["losses"] == hpz[0]["losses"]
    for rank, counts in enumerate(hpz):
        inside = [entry["ranks"] for entry in counts["sent"] if len(entry["ranks"]) == 2]
        assert inside and all(rank in ranks and ranks in ([0, 1], [2, 3]) for ranks in inside), (
            "a gathering of two ranks leaves its host"
        )
    formulas = [plan.traffic(config, 4) for config in configs]
    print(
        f"\nhpZ of 2 on 2 hosts x 2 ranks, MB a rank: among all {sent(plain[0], 4) / 1e6:.2f} ->"
        f" {sent(hpz[0], 4) / 1e6:.2f} (formula {formulas[0].everywhere / 1e6:.2f} ->"
        f" {formulas[1].everywhere / 1e6:.2f}), inside a host 0 -> {sent(hpz[0], 2) / 1e6:.2f}"
        f" (formula {formulas[1].in_node / 1e6:.2f}); on the wire of a host"
        f" {plain[0]['wire'] / 1e6:.2f} -> {hpz[0]['wire'] / 1e6:.2f}"
    )
    for counts, formula in ((plain[0], formulas[0]), (hpz[0], formulas[1])):
        assert 0.9 * formula.everywhere <= sent(counts, 4) <= 1.05 * formula.everywhere
        assert 0.8 * formula.in_node <= sent(counts, 2) <= formula.in_node
    saved = sent(plain[0], 4) - sent(hpz[0], 4)
    assert plain[0]["wire"] - hpz[0]["wire"] == pytest.approx(saved, rel=0.35)
