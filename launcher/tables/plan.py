"""Output of `nextpt plan`: JSON, text and the table of options."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from humanize import metric
from rich.table import Table

from launcher.console import build_table, console, echo
from nextpt.config import Config
from nextpt.scaling.plan import RESERVED, Option, Plan

GIB = 2**30
HEADINGS = (
    "ZeRO",
    "states",
    "buffers",
    "activ.",
    "total",
    "sends",
    "comm. s",
    "step s",
    "tokens/s",
    "days",
)


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values: bytes, seconds, tokens."""
    best = plan.best
    return {
        "run": plan.config.run.name,
        "devices": plan.devices,
        "device": asdict(plan.machine),
        "utilisation": plan.utilisation,
        "counts": asdict(plan.counts),
        "tokens_per_step": plan.tokens_per_step,
        "steps": plan.config.total_steps,
        "total_tokens": plan.total_tokens,
        "total_flops": plan.counts.training_flops_per_token * plan.total_tokens,
        "accumulation_steps": plan.accumulation,
        "usable_bytes": plan.usable,
        "options": [_option_json(plan, option) for option in plan.options],
        "best": _option_json(plan, best) if best else None,
    }


def _option_json(plan: Plan, option: Option) -> dict[str, Any]:
    return {
        "zero_stage": option.stage,
        "activation_checkpointing": option.checkpointing,
        "fits": option.fits,
        "memory_bytes": asdict(option.memory) | {"total": option.memory.total},
        "traffic_bytes_per_step": option.traffic,
        "communication_seconds": option.communication,
        "step_seconds": option.seconds,
        "optimizer": asdict(option.optimizer),
        "tokens_per_second": plan.tokens_per_second(option),
        "days": plan.days(option),
    }


def format_batches(config: Config) -> str:
    """Tokens per step, such as "8,192 to step 100, then 16,384"."""
    phases = config.batches.phases(config.total_steps)
    length = config.data.sequence_length
    parts = [f"{size * length:,} to step {last:,}" for _, last, size in phases[:-1]]
    return ", then ".join([*parts, f"{phases[-1][2] * length:,}"])


def print_plan(plan: Plan) -> None:
    """Print the run's quantities, the table of options and the recommended one."""
    config, machine, counts = plan.config, plan.machine, plan.counts
    mtp = counts.mtp_parameters
    trained_only = f", {mtp:,} only in training" if mtp else ""
    echo(
        f"{config.run.name}: {counts.parameters:,} parameters ({counts.non_embedding_parameters:,}"
        f" without embeddings{trained_only}), {counts.training_flops_per_token:.3g} FLOPs per token"
    )
    echo(
        f"{plan.total_tokens:,} tokens in {config.total_steps:,} steps of"
        f" {format_batches(config)} ({plan.total_tokens / counts.parameters:.1f} tokens per"
        f" parameter), {counts.training_flops_per_token * plan.total_tokens:.3g} FLOPs in total"
    )
    echo(
        f"{plan.devices:,} x {machine.name}: {machine.memory / GIB:.0f} GiB each, of which"
        f" {RESERVED:.0%} stay free; peak {machine.peak / 1e12:,.0f} TFLOP/s, utilization"
        f" {plan.utilisation:.0%}; {plan.accumulation} micro-batches of"
        f" {config.train.micro_batch_size} per step"
    )
    if plan.devices > 1:
        echo(
            f"links {machine.link / 1e9:,.0f} GB/s in a node of {machine.node_size},"
            f" {machine.node_network / 1e9:,.0f} GB/s between nodes: a ring has"
            f" {machine.bus(plan.devices) / 1e9:,.0f} GB/s per device"
        )
    echo()
    console.print(_options_table(plan))
    if any(option.optimizer.flops for option in plan.options):
        console.print(_optimizer_table(plan))
    _print_recommendation(plan)


def _options_table(plan: Plan) -> Table:
    table = build_table(
        "GiB per rank; GB that a device sends in a step; * fits (r: activation checkpointing)",
        HEADINGS,
    )
    for option in plan.options:
        memory = option.memory
        sizes = (
            memory.weights + memory.gradients + memory.optimizer,
            memory.buffers,
            memory.activations + memory.loss,
            memory.total,
        )
        table.add_row(
            f"{option.stage}{' r' if option.checkpointing else ''}{' *' if option.fits else ''}",
            *(f"{size / GIB:,.1f}" for size in sizes),
            f"{option.traffic / 1e9:,.1f}",
            f"{option.communication:,.3f}",
            f"{option.seconds:,.3f}",
            metric(plan.tokens_per_second(option)),
            f"{plan.days(option):,.2f}",
            style="" if option.fits else "dim",
        )
    return table


def _optimizer_table(plan: Plan) -> Table:
    """Exchange of matrices and orthogonalization by ZeRO stage; they are in the step above."""
    table = build_table(
        f"{plan.config.optimizer.kind}, of the rank with most work in a step",
        ("ZeRO", "exchange GB", "exchange s", "NS TFLOPs", "NS s"),
    )
    for stage, work in {option.stage: option.optimizer for option in plan.options}.items():
        table.add_row(
            str(stage),
            f"{work.exchange_bytes / 1e9:,.3f}",
            f"{work.exchange_seconds:,.4f}",
            f"{work.flops / 1e12:,.2f}",
            f"{work.seconds:,.4f}",
        )
    return table


def _print_recommendation(plan: Plan) -> None:
    best = plan.best
    if best is None:
        least = min(plan.options, key=lambda option: option.memory.total)
        recompute = " with recomputation" if least.checkpointing else ""
        echo(
            f"nothing fits: the smallest option, ZeRO-{least.stage}{recompute}, takes"
            f" {least.memory.total / GIB:,.1f} GiB of {plan.usable / GIB:,.1f}. More devices divide"
            " the states; a smaller train.micro_batch_size or data.sequence_length reduces"
            " activations"
        )
        return
    keys = (
        f"train.zero_stage={best.stage}"
        f" train.activation_checkpointing={str(best.checkpointing).lower()}"
    )
    echo(
        f"fastest that fits: {keys}: {plan.days(best):,.2f} days, {best.memory.total / GIB:,.1f}"
        f" of {plan.usable / GIB:,.1f} GiB"
    )
    if best.communication > best.seconds / 3:
        echo(
            f"communication alone takes {best.communication / best.seconds:.0%} of a step: a larger"
            " train.global_batch_size or fewer devices would use the devices better"
        )
    echo(
        "days are of training steps only, without validation, checkpoints and failures. The latency"
        " of collectives is not included"
    )
