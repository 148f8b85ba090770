"""How a plan is shown."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import humanize
from rich import box
from rich.table import Table

from launcher.console import console, echo
from nextpt.scaling.plan import RESERVED, Option, Plan

GIB = 2**30


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, tokens."""

    def option(o: Option) -> dict[str, Any]:
        return {
            "zero_stage": o.stage,
            "activation_checkpointing": o.checkpointing,
            "fits": o.fits,
            "memory_bytes": asdict(o.memory) | {"total": o.memory.total},
            "traffic_bytes_per_step": o.traffic,
            "communication_seconds": o.communication,
            "step_seconds": o.seconds,
            "tokens_per_second": plan.tokens_per_second(o),
            "days": plan.days(o),
        }

    best = plan.best
    return {
        "run": plan.config.run.name,
        "devices": plan.devices,
        "device": asdict(plan.machine),
        "utilisation": plan.utilisation,
        "counts": asdict(plan.counts),
        "tokens_per_step": plan.config.tokens_per_step,
        "steps": plan.config.total_steps,
        "total_tokens": plan.total_tokens,
        "total_flops": plan.counts.training_flops_per_token * plan.total_tokens,
        "accumulation_steps": plan.accumulation,
        "usable_bytes": plan.usable,
        "options": [option(o) for o in plan.options],
        "best": option(best) if best else None,
    }


def print_plan(plan: Plan) -> None:
    """Figures, the table of options, and what to choose."""
    config, machine, counts = plan.config, plan.machine, plan.counts
    echo(
        f"{config.run.name}: {counts.parameters:,} parameters ({counts.non_embedding_parameters:,}"
        f" without embeddings), {counts.training_flops_per_token:.3g} FLOPs per token"
    )
    echo(
        f"{plan.total_tokens:,} tokens in {config.total_steps:,} steps of"
        f" {config.tokens_per_step:,} ({plan.total_tokens / counts.parameters:.1f} tokens per"
        f" parameter), {counts.training_flops_per_token * plan.total_tokens:.3g} FLOPs in all"
    )
    echo(
        f"{plan.devices:,} x {machine.name}: {machine.memory / GIB:.0f} GiB each, of which"
        f" {RESERVED:.0%} stay free; peak {machine.peak / 1e12:,.0f} TFLOP/s, used at"
        f" {plan.utilisation:.0%}; {plan.accumulation} micro-batches of"
        f" {config.train.micro_batch_size} per step"
    )
    if plan.devices > 1:
        echo(
            f"links {machine.link / 1e9:,.0f} GB/s in a node of {machine.node_size},"
            f" {machine.node_network / 1e9:,.0f} GB/s between nodes: a ring gives"
            f" {machine.bus(plan.devices) / 1e9:,.0f} GB/s per device"
        )
    echo()
    console.print(_table(plan))
    _print_choice(plan)


def _table(plan: Plan) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        padding=(0, 1, 0, 0),
        title=(
            "GiB per rank; GB that a device sends in a step; * fits (r: activation checkpointing)"
        ),
    )
    table.add_column("ZeRO", no_wrap=True)
    for heading in (
        "states",
        "buffers",
        "activ.",
        "total",
        "sends",
        "comm. s",
        "step s",
        "tokens/s",
        "days",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for o in plan.options:
        m = o.memory
        cells = [
            (m.weights + m.gradients + m.optimizer) / GIB,
            m.buffers / GIB,
            (m.activations + m.loss) / GIB,
            m.total / GIB,
        ]
        name = f"{o.stage}{' r' if o.checkpointing else ''}{' *' if o.fits else ''}"
        table.add_row(
            name,
            *(f"{cell:,.1f}" for cell in cells),
            f"{o.traffic / 1e9:,.1f}",
            f"{o.communication:,.3f}",
            f"{o.seconds:,.3f}",
            humanize.metric(plan.tokens_per_second(o)),
            f"{plan.days(o):,.2f}",
            style="" if o.fits else "dim",
        )
    return table


def _print_choice(plan: Plan) -> None:
    best = plan.best
    if best is None:
        least = min(plan.options, key=lambda o: o.memory.total)
        echo(
            "nothing fits: the least,"
            f" ZeRO-{least.stage}{' with recomputation' if least.checkpointing else ''}, takes"
            f" {least.memory.total / GIB:,.1f} GiB of {plan.usable / GIB:,.1f}. More devices divide"
            " the states; a smaller train.micro_batch_size or data.sequence_length cuts"
            " activations"
        )
        return
    keys = (
        f"train.zero_stage={best.stage}"
        f" train.activation_checkpointing={str(best.checkpointing).lower()}"
    )
    echo(
        f"quickest that fits: {keys}: {plan.days(best):,.2f} days, {best.memory.total / GIB:,.1f}"
        f" of {plan.usable / GIB:,.1f} GiB"
    )
    if best.communication > best.seconds / 3:
        echo(
            f"communication alone takes {best.communication / best.seconds:.0%} of a step: a larger"
            " train.global_batch_size or fewer devices would use them better"
        )
    echo(
        "days are of stepping only; validation, saving and failures come on top. Latency of"
        " collectives is not in the figures"
    )
