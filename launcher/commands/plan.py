"""`nextpt plan`: memory, time and communication of a run before it is started."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from launcher.options import Overrides
from launcher.registration import add_command


def plan(
    config: Annotated[str, typer.Option(help="YAML file, see configs/")],
    devices: Annotated[int, typer.Option(min=1, help="how many devices, one rank on each")],
    overrides: Overrides = None,
    device: Annotated[
        str, typer.Option(help="a10, l40s, a100-40, a100, h100, h200 or b200")
    ] = "h100",
    utilisation: Annotated[
        float, typer.Option(min=0.001, max=1, help="share of the peak that the model's FLOPs reach")
    ] = 0.4,
    memory: Annotated[
        float | None,
        typer.Option(min=0.1, help="memory of a device, GiB; the device's own unless given"),
    ] = None,
    peak: Annotated[
        float | None, typer.Option(min=0.001, help="dense peak of a device, TFLOP/s")
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB/s of a device inside its node, one direction"),
    ] = None,
    network: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s of a node, all adapters; 400 unless given")
    ] = None,
    node_size: Annotated[
        int | None, typer.Option(min=1, help="devices per node; 8 unless given")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
) -> None:
    """Memory, time and traffic of a run on many devices, for every ZeRO stage, before it is started."""
    from launcher.tables.plan import plan_json, say_plan
    from nextpt.config import load_config
    from nextpt.scaling.machines import machine
    from nextpt.scaling.plan import plan as make_plan

    chosen = machine(
        device,
        memory_gib=memory,
        peak_tflops=peak,
        link_gbs=link,
        node_gbs=network,
        node_size=node_size,
    )
    made = make_plan(load_config(config, overrides or []), devices, chosen, utilisation)
    if as_json:
        print(json.dumps(plan_json(made), indent=1))
    else:
        say_plan(made)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app,
        "plan",
        plan,
        example="nextpt plan --config configs/7b.yaml --devices 256 --device h100 train.micro_batch_size=2",
    )
