"""`nextpt config`: print a resolved config, and what every key means."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.console import echo
from launcher.options import Overrides
from launcher.registration import add_command, add_group


def config_show(
    file: Annotated[str, typer.Argument(help="YAML file, see configs/")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="ranks to divide the state among")] = 1,
) -> None:
    """Print the resolved run and the figures derived from it."""
    from nextpt.config import load_config, to_yaml
    from nextpt.model import ModelSpec, count
    from nextpt.train.memory import estimate_memory, usual_device

    config = load_config(file, overrides or [])
    counts, memory = (
        count(
            ModelSpec.from_config(config),
            config.data.sequence_length,
        ),
        estimate_memory(config, ranks, device=usual_device(config)),
    )
    tokens = config.total_steps * config.tokens_per_step
    accumulation = config.accumulation_steps(ranks)
    echo(to_yaml(config))
    echo("# derived")
    echo(f"parameters              {counts.parameters:>20,}")
    echo(f"  non-embedding         {counts.non_embedding_parameters:>20,}")
    echo(
        f"FLOPs per token         {counts.training_flops_per_token:>20,.0f}   (causal:"
        f" {counts.causal_flops_per_token:,.0f})"
    )
    echo(
        f"tokens per step         {config.tokens_per_step:>20,}   ({accumulation} micro-batches on"
        f" each of {ranks} ranks)"
    )
    echo(f"steps                   {config.total_steps:>20,}")
    echo(f"total tokens            {tokens:>20,}")
    echo(f"tokens per parameter    {tokens / counts.parameters:>20,.1f}")
    echo(
        f"memory per rank         {memory.total / 2**30:>16,.2f} GiB   (estimate for"
        f" ZeRO-{config.train.zero_stage})"
    )
    for name in ("weights", "gradients", "optimizer", "buffers", "activations", "loss"):
        echo(f"  {name:<21} {getattr(memory, name) / 2**30:>16,.2f} GiB")


def config_keys() -> None:
    """List every key with its meaning."""
    from nextpt.config import describe_keys

    for key in describe_keys():
        facts = [key.default, key.metadata.unit, key.bound]
        if key.may_change:
            facts.append("may change on resume")
        echo(f"{key.name:<34} {key.field.description} ({'; '.join(f for f in facts if f)})")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = add_group(app, "config", help="Look at configs.")
    add_command(
        group,
        "show",
        config_show,
        example="nextpt config show configs/7b.yaml --ranks 64 train.zero_stage=3",
    )
    add_command(group, "keys", config_keys)
