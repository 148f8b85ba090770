"""Plans: against values by hand, published ones, and measured ranks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.tables.plan import plan_json, print_plan
from nextpt.base.errors import ConfigError
from nextpt.config import Config, load_config
from nextpt.model import ModelSpec, count
from nextpt.optim.muon import Muon
from nextpt.optim.spec import StepCost
from nextpt.scaling.machines import MACHINES, machine
from nextpt.scaling.plan import RESERVED, plan, step_cost, traffic, variant
from tests.support.commands import run_command

ROOT = Path(__file__).resolve().parents[2]


def config(name: str = "7b", *overrides: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml", overrides)


# The papers' optimizer; Muon has less state, an exchange of its own and more arithmetic
ADAMW = "optimizer.kind=adamw"


def nextpt_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command("plan", *arguments, COLUMNS="80")


def test_states_of_the_zero_paper() -> None:
    """ArXiv 1910.02054 figure 1: 7.5B parameters on 64 devices, 12 bytes of optimizer state.

    Its gradients have 2 bytes, ours 4.
    """
    options = {
        (o.stage, o.checkpointing): o.memory
        for o in plan(config("7b", ADAMW), 64, MACHINES["h100"], 0.4).options
    }
    n = count(ModelSpec.from_config(config("7b", ADAMW))).parameters
    assert n == pytest.approx(7.5e9, rel=0.01)
    assert options[1, False].weights == 2 * n and options[1, False].optimizer == pytest.approx(
        12 * n / 64, abs=64
    )
    assert (
        options[2, False].gradients == pytest.approx(4 * n / 64, abs=64)
        and options[2, False].weights == 2 * n
    )
    assert options[3, False].weights == pytest.approx(2 * n / 64, abs=64)
    # The paper: 31.4 GB with 2 x 7.5 of gradients
    assert options[1, False].weights + options[1, False].optimizer == pytest.approx(
        16.4e9, rel=0.02
    )


def test_traffic_of_the_zero_paper() -> None:
    """Section 7: stage 3 moves three times the parameters.

    At stages 1 and 2 DeepSpeed gives all gradients to all ranks, which the paper does not: twice
    the gradients and the weights, not once each. With fp32 weights and gradients.
    """
    base = config(
        "7b",
        ADAMW,
        "train.precision=fp32",
        "train.global_batch_size=64",
        "train.micro_batch_size=1",
    )
    n = 4 * count(ModelSpec.from_config(base)).parameters * 63 / 64
    for stage, times in ((0, 2), (1, 3), (2, 3), (3, 3)):
        assert traffic(variant(base, stage, False), 64).total == pytest.approx(times * n), stage
    twice = config(
        "7b",
        ADAMW,
        "train.precision=fp32",
        "train.global_batch_size=128",
        "train.micro_batch_size=1",
    )
    assert traffic(variant(twice, 2, False), 64).total == pytest.approx(5 * n) and traffic(
        variant(twice, 3, False), 64
    ).total == pytest.approx(6 * n)
    assert traffic(variant(base, 3, False), 1).total == 0


def test_hpz_gathers_once_among_all_and_then_inside_a_node() -> None:
    plain = config(
        "7b", "train.zero_stage=3", "train.global_batch_size=128", "train.micro_batch_size=1"
    )
    hpz = config(
        "7b",
        "train.zero_stage=3",
        "train.global_batch_size=128",
        "train.micro_batch_size=1",
        "train.hpz_ranks=8",
    )
    weights, gradients = (
        2 * count(ModelSpec.from_config(plain)).parameters,
        4 * count(ModelSpec.from_config(plain)).parameters,
    )
    volume = traffic(hpz, 64)
    assert (
        traffic(plain, 64).everywhere == pytest.approx((4 * weights + 2 * gradients) * 63 / 64)
        and traffic(plain, 64).in_node == 0
    )
    assert volume.everywhere == pytest.approx(
        (weights + 2 * gradients) * 63 / 64
    ) and volume.in_node == pytest.approx(3 * weights * 7 / 8)
    slow = machine("h100", node_gbs=50)
    seconds = {
        key: (
            {o.stage: o for o in plan(c, 64, slow, 0.4).options if not o.checkpointing}[
                3
            ].communication
        )
        for key, c in (("plain", plain), ("hpz", hpz))
    }
    assert seconds["hpz"] < 0.8 * seconds["plain"]
    memory = [
        {o.stage: o for o in plan(c, 64, slow, 0.4).options if not o.checkpointing}[
            3
        ].memory.weights
        for c in (plain, hpz)
    ]
    assert memory[1] - memory[0] == pytest.approx(weights / 8, abs=8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("train.zero_stage=2", "train.hpz_ranks=8"),
            "train.hpz_ranks = 8 is for train.zero_stage = 3",
        ),
        (
            ("train.zero_stage=3", "train.hpz_ranks=6"),
            "train.hpz_ranks = 6 does not divide the 64 ranks",
        ),
    ],
)
def test_invalid_hpz_sizes_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("7b", *overrides).accumulation_steps(64)


@pytest.mark.process
def test_hpz_stays_inside_a_node() -> None:
    completed = nextpt_plan(
        "--config", "configs/7b.yaml", "--devices", "64", "train.zero_stage=3", "train.hpz_ranks=16"
    )
    assert (
        completed.returncode == 2
        and "does not divide the 8 devices of a node" in completed.stderr
        and completed.stderr.count("\n") == 1
    )
    sixteen = config("7b", "train.zero_stage=3", "train.hpz_ranks=16")
    assert plan(sixteen, 64, machine("h100", node_size=16), 0.4).best is not None


def test_time_is_flops_over_peak() -> None:
    estimate = plan(config("7b", ADAMW), 256, MACHINES["h100"], 0.4)
    tokens = estimate.total_tokens
    days = (
        count(
            ModelSpec.from_config(estimate.config), estimate.config.data.sequence_length
        ).training_flops_per_token
        * tokens
        / (256 * 989e12 * 0.4)
        / 86400
    )
    assert estimate.best is not None and estimate.days(estimate.best) == pytest.approx(
        days, rel=1e-6
    )
    assert estimate.tokens_per_second(estimate.best) * estimate.days(
        estimate.best
    ) * 86400 == pytest.approx(tokens, rel=1e-6)
    half = plan(config("7b", ADAMW), 256, MACHINES["h100"], 0.2)
    assert half.days(half.best) == pytest.approx(2 * days, rel=1e-6)


def test_recomputation_takes_less_memory_and_a_third_more_time() -> None:
    options = {
        (o.stage, o.checkpointing): o for o in plan(config(), 256, MACHINES["h100"], 0.4).options
    }
    for stage in (1, 2, 3):
        plain, recomputed = options[stage, False], options[stage, True]
        assert recomputed.memory.total < plain.memory.total and recomputed.traffic == plain.traffic
        assert recomputed.seconds - plain.seconds == pytest.approx(
            plan(config(), 256, MACHINES["h100"], 0.4).compute_seconds / 3, rel=0.01
        )


def test_slow_networks_show_in_the_step() -> None:
    fast = plan(config(), 256, MACHINES["h100"], 0.4)
    slow = plan(config(), 256, machine("h100", node_gbs=3), 0.4)
    assert slow.machine.bus(256) == 3e9 and slow.machine.bus(8) == 450e9
    assert all(a.seconds > b.seconds for a, b in zip(slow.options, fast.options, strict=True))
    assert slow.best.communication > slow.best.seconds / 3


@pytest.mark.process
def test_configs_that_do_not_fit_are_reported() -> None:
    estimate = plan(config("70b"), 8, MACHINES["a10"], 0.4)
    assert estimate.best is None and not any(o.fits for o in estimate.options)
    edge = plan(config("124m"), 1, MACHINES["a10"], 0.4)
    assert (
        edge.best is not None and edge.best.memory.total <= (1 - RESERVED) * MACHINES["a10"].memory
    )
    completed = nextpt_plan("--config", "configs/70b.yaml", "--devices", "8", "--device", "a10")
    assert completed.returncode == 0 and "nothing fits" in completed.stdout


@pytest.mark.process
def test_thousands_of_devices() -> None:
    completed = nextpt_plan(
        "--config", "configs/70b.yaml", "--devices", "4096", "train.global_batch_size=4096"
    )
    assert completed.returncode == 0, completed.stderr
    assert (
        "4,096 x H100" in completed.stdout
        and "fastest that fits: train.zero_stage=3" in completed.stdout
    )
    table = [line for line in completed.stdout.splitlines() if line.startswith(" ")]
    assert len(table) > 8 and max(map(len, table)) <= 80


@pytest.mark.process
def test_json_has_bytes_and_seconds() -> None:
    completed = nextpt_plan(
        "--config",
        "configs/1.3b.yaml",
        "--devices",
        "16",
        "--device",
        "a100",
        "--utilisation",
        "0.5",
        "--json",
    )
    result = json.loads(completed.stdout)
    assert result["devices"] == 16 and len(result["options"]) == 6 and result["best"]["fits"]
    for option in result["options"]:
        memory = option["memory_bytes"]
        assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
        assert option["fits"] == (memory["total"] <= result["usable_bytes"])


def test_what_muon_adds_to_a_step_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    machine = MACHINES["h100"]
    estimate = plan(config("1.3b", "optimizer.kind=muon"), 64, machine, 0.4)
    for option, facts in zip(estimate.options, plan_json(estimate)["options"], strict=True):
        cost = step_cost(variant(estimate.config, option.stage, False), 64)
        work = facts["optimizer"]
        assert work["flops"] == max(cost.flops) > 0
        assert work["exchange_bytes"] == max(cost.sent_bytes) > 0
        assert work["seconds"] == pytest.approx(work["flops"] / (0.4 * machine.peak))
        exchange = work["exchange_bytes"] / machine.direct(64)
        assert work["exchange_seconds"] == pytest.approx(exchange)
    print_plan(estimate)
    title = "muon, of the rank with most"
    assert title in capsys.readouterr().out
    plain = plan(config("1.3b", ADAMW), 64, machine, 0.4)
    assert not any(plan_json(plain)["best"]["optimizer"].values())
    print_plan(plain)
    assert title not in capsys.readouterr().out


def test_owners_of_matrices_are_assigned_once_per_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    stages, assignments = [], Muon.step_cost

    def counted(*arguments: Any) -> StepCost:
        stages.append(1)
        return assignments(*arguments)

    monkeypatch.setattr(Muon, "step_cost", counted)
    options = plan(config("1.3b", "optimizer.kind=muon"), 8, MACHINES["h100"], 0.4).options
    assert len(stages) == len({option.stage for option in options}) == len(options) / 2 == 3


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/7b.yaml", "--devices", "7"], "train.global_batch_size"),
        (["--config", "configs/7b.yaml", "--devices", "8", "--device", "tpu"], "known are a10"),
        (["--config", "configs/none.yaml", "--devices", "8"], "does not exist"),
    ],
)
def test_user_errors_of_plan(arguments: list[str], message: str) -> None:
    completed = nextpt_plan(*arguments)
    assert (
        completed.returncode == 2
        and message in completed.stderr
        and completed.stderr.count("\n") == 1
    )


def test_a_user_defined_machine() -> None:
    own = machine("H100", memory_gib=40, peak_tflops=100, link_gbs=10, node_gbs=5, node_size=4)
    assert (own.memory, own.peak, own.bus(4), own.bus(8)) == (40 * 2**30, 100e12, 10e9, 5e9)
    with pytest.raises(ConfigError, match="--memory"):
        machine("mi300")


def test_a_ramp_takes_the_time_of_its_parts() -> None:
    """500 steps of 1,024 sequences and 300 of 2,048, against runs of one of these batches."""
    small, large = (
        plan(config("7b", "train.tokens=null", *keys), 256, MACHINES["h100"], 0.4)
        for keys in (
            ["train.steps=500", "train.global_batch_size=1024", "schedule.warmup=10"],
            ["train.steps=300", "train.global_batch_size=2048", "schedule.warmup=10"],
        )
    )
    schedule = "train.batch_schedule=[{after_steps: 500, global_batch_size: 2048}]"
    keys = ["train.tokens=null", "train.steps=800", "train.global_batch_size=1024", schedule]
    warmup = "schedule.warmup=10"
    ramp = plan(config("7b", *keys, warmup), 256, MACHINES["h100"], 0.4)
    assert ramp.total_tokens == small.total_tokens + large.total_tokens
    assert ramp.tokens_per_step == large.tokens_per_step == 2 * small.tokens_per_step
    for whole, first, second in zip(ramp.options, small.options, large.options, strict=True):
        assert whole.run_seconds == pytest.approx(first.run_seconds + second.run_seconds)
        assert whole.seconds == second.seconds and whole.traffic == second.traffic
