"""`nextpt plan`: memory, time and communication of a run before it is started."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from launcher.options import ConfigFile, DeviceName, Overrides, PrintJson, Utilization
from launcher.registration import add_command

Devices = Annotated[int, typer.Option(min=1, help="number of devices, one rank on each")]
Memory = Annotated[
    float | None, typer.Option(min=0.1, help="memory of a device, GiB [default: by --device]")
]
Peak = Annotated[
    float | None,
    typer.Option(min=0.001, help="dense peak of a device, TFLOP/s [default: by --device]"),
]
Link = Annotated[
    float | None,
    typer.Option(
        min=0.001, help="GB/s of a device inside its node, one direction [default: by --device]"
    ),
]
Network = Annotated[
    float | None, typer.Option(min=0.001, help="GB/s of a node, all adapters [default: 400]")
]
NodeSize = Annotated[int | None, typer.Option(min=1, help="devices per node [default: 8]")]


def plan(
    config: ConfigFile,
    devices: Devices,
    overrides: Overrides = None,
    device: DeviceName = "h100",
    utilisation: Utilization = 0.4,
    memory: Memory = None,
    peak: Peak = None,
    link: Link = None,
    network: Network = None,
    node_size: NodeSize = None,
    as_json: PrintJson = False,
) -> None:
    """Estimate memory, time and communication of a run for every ZeRO stage."""
    from launcher.tables.plan import plan_json, print_plan
    from nextpt.config import load_config
    from nextpt.data.epochs import count_epoch
    from nextpt.scaling.machines import machine
    from nextpt.scaling.plan import plan as make_plan

    hardware = machine(
        device,
        memory_gib=memory,
        peak_tflops=peak,
        link_gbs=link,
        node_gbs=network,
        node_size=node_size,
    )
    run = count_epoch(load_config(config, overrides or []))
    estimate = make_plan(run, devices, hardware, utilisation)
    if as_json:
        print(json.dumps(plan_json(estimate), indent=1))
    else:
        print_plan(estimate)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    add_command(
        app,
        "plan",
        plan,
        example=(
            "nextpt plan --config configs/7b.yaml --devices 256 --device h100"
            " train.micro_batch_size=2"
        ),
    )
