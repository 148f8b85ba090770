"""`nextpt config`: print a resolved config, and the meaning of every key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launcher.console import echo
from launcher.options import Overrides
from launcher.registration import add_command, add_group

if TYPE_CHECKING:
    from nextpt.config import Config
    from nextpt.model import ModelSpec

MIB, GIB = 2**20, 2**30
MEMORY_PARTS = ("weights", "gradients", "optimizer", "buffers", "activations", "loss")


def config_show(
    file: Annotated[str, typer.Argument(help="YAML file of the run, see configs/")],
    overrides: Overrides = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="ranks among which memory and batches are divided")
    ] = 1,
) -> None:
    """Print the resolved config and the quantities derived from it."""
    from nextpt.config import load_config, to_yaml
    from nextpt.data.epochs import count_epoch
    from nextpt.model import ModelSpec, count
    from nextpt.optim.schedules import learning_rate, milestones
    from nextpt.train.memory import default_device, estimate_memory

    config = count_epoch(load_config(file, overrides or []))
    spec = ModelSpec.from_config(config)
    counts = count(spec, config.data.sequence_length)
    cached = counts.cache_elements * (2 if config.train.precision == "bf16" else 4) / MIB
    memory = estimate_memory(config, ranks, device=default_device(config))
    tokens = config.total_tokens
    echo(to_yaml(config))
    echo("# derived")
    echo(f"parameters              {counts.parameters:>20,}")
    echo(f"  non-embedding         {counts.non_embedding_parameters:>20,}")
    if spec.mtp_depth:
        echo(f"  only in training      {counts.mtp_parameters:>20,}   (multi-token prediction)")
    echo(
        f"FLOPs per token         {counts.training_flops_per_token:>20,.0f}"
        f"   (causal: {counts.causal_flops_per_token:,.0f})"
    )
    if spec.has_mixed_windows:
        echo(
            f"local layers            {spec.layer_pattern.count('local'):>20,}"
            f"   (of {spec.depth}, a window of {spec.sliding_window:,} tokens)"
        )
    echo(
        f"cache per sequence      {cached:>16,.2f} MiB"
        f"   (keys and values of {config.data.sequence_length:,} tokens, {config.train.precision})"
    )
    for first, last, size in config.batches.phases(config.total_steps):
        until = f", to step {last:,}" if last < config.total_steps else ""
        echo(
            f"tokens per step         {size * config.data.sequence_length:>20,}"
            f"   ({config.accumulation_steps(ranks, first)} micro-batches on each of {ranks}"
            f" ranks{until})"
        )
    growth = config.train.batch_growth
    note = f"   (the most: the batch may grow to {growth.max_batch_size})" if growth else ""
    echo(f"steps                   {config.total_steps:>20,}{note}")
    echo(f"total tokens            {tokens:>20,}")
    for step, name in milestones(config):
        rate = learning_rate(config, max(step, 1))
        echo(f"learning rate           {rate:>20.3g}   (step {step:,}, {name})")
    echo(f"tokens per parameter    {tokens / counts.parameters:>20,.1f}")
    echo(
        f"memory per rank         {memory.total / GIB:>16,.2f} GiB"
        f"   (estimate for ZeRO-{config.train.zero_stage})"
    )
    for part in MEMORY_PARTS:
        echo(f"  {part:<21} {getattr(memory, part) / GIB:>16,.2f} GiB")
    _show_parametrization(spec)
    flops = counts.training_flops_per_token * tokens / config.total_steps
    _show_optimizer(config, flops, ranks)


def _show_parametrization(spec: ModelSpec) -> None:
    """Print what initial values and multipliers of the model follow from its parametrization."""
    rules = spec.rules
    ratios = [f"m = {spec.width} / {spec.base_width} = {rules.width_ratio:.4g}"]
    if spec.base_depth is not None:
        ratios.append(f"L = {spec.depth} / {spec.base_depth} = {rules.depth_ratio:.4g}")
    note = "" if rules.kind == "standard" else f"   ({', '.join(ratios)})"
    echo(f"parametrization         {rules.kind:>20}{note}")
    matrices = rules.init_std(spec.init_std, "matrices")
    residual = rules.init_std(spec.init_std, "matrices", residual=True)
    outputs = "0" if spec.residual_init == "zero" else f"{residual:.3g}"
    echo(
        f"  initial std           {spec.init_std:>20.3g}   (matrices of blocks {matrices:.3g},"
        f" o_proj and down_proj {outputs})"
    )
    echo(f"  residual multiplier   {spec.effective_residual_multiplier:>20.4g}")
    echo(f"  attention scale       {rules.attention_scale:>20.4g}")
    echo(f"  logits divided by     {spec.effective_logits_scaling:>20.4g}")


def _show_optimizer(config: Config, flops: float, ranks: int) -> None:
    """Print the groups of parameters, and the share of a step's FLOPs that the optimizer adds.

    Args:
        config: The run.
        flops: FLOPs of the model in a step, on average over the run.
        ranks: Number of ranks.
    """
    from math import prod

    from nextpt.model import ModelSpec, parameter_shapes
    from nextpt.optim.registry import optimizer_spec
    from nextpt.scaling.plan import step_cost

    spec, shapes = optimizer_spec(config), parameter_shapes(ModelSpec.from_config(config))
    echo("optimizer groups                  parameters   peak learning rate, weight decay, eps")
    names = spec.names_by_group(shapes)
    for group in spec.groups:
        if parameters := sum(prod(shapes[name]) for name in names[group.name]):
            lr, decay = config.optimizer.lr * group.lr_factor, group.options.get("weight_decay", 0)
            eps = f", {group.options['eps']:.3g}" if "eps" in group.options else ""
            echo(f"  {group.name:<21} {parameters:>20,}   {lr:.3g}, {decay:.4g}{eps}")
    share = sum(step_cost(config, ranks).flops) / flops
    if share:
        echo(f"orthogonalization       {share:>20.2%}   of the model's FLOPs in a step")


def config_keys() -> None:
    """List every key with its meaning, default, unit and bound."""
    from nextpt.config import describe_keys

    for key in describe_keys():
        facts = [key.default, key.metadata.unit, key.bound]
        if key.may_change:
            facts.append("may change on resume")
        echo(f"{key.name:<34} {key.field.description} ({'; '.join(f for f in facts if f)})")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = add_group(app, "config", help="Print configs and the meaning of their keys.")
    add_command(
        group,
        "show",
        config_show,
        example="nextpt config show configs/7b.yaml --ranks 64 train.zero_stage=3",
    )
    add_command(group, "keys", config_keys)
