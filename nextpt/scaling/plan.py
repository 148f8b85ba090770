"""Plan of a run: estimated memory, time and communication for every ZeRO stage.

Nothing is measured here and nothing starts; a config is planned for any number of devices, on any
machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from nextpt.base.errors import ConfigError
from nextpt.config import Config
from nextpt.model import Counts, ModelSpec, count, parameter_shapes
from nextpt.optim.registry import optimizer_spec
from nextpt.optim.spec import StepCost
from nextpt.scaling.machines import Machine
from nextpt.train.memory import LIVE_PARAMETERS, MemoryEstimate, estimate_memory
from nextpt.train.zero_layout import zero_layout

# Kept free: CUDA context, NCCL's buffers, fragmentation of the allocator. An assumption, not
# measured.
RESERVED = 0.10
# Of the compute of a step, in which gradients can travel (arXiv 2001.08361: backward is twice
# forward)
BACKWARD = 2 / 3
# More compute with activation checkpointing: one more forward pass (arXiv 1604.06174)
RECOMPUTE = 1 / 3


@dataclass(frozen=True)
class OptimizerWork:
    """Work of a step of the optimizer beyond elementwise, of the rank that has most of it.

    Attributes:
        exchange_bytes: Bytes that it sends.
        exchange_seconds: Seconds in which they are sent.
        flops: FLOPs of its matrix products (Newton-Schulz).
        seconds: Seconds of these products.
    """

    exchange_bytes: float
    exchange_seconds: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Option:
    """A ZeRO stage with or without activation checkpointing.

    Attributes:
        stage: ZeRO stage.
        checkpointing: Whether activations are recomputed.
        memory: Memory per rank.
        fits: Whether it fits into the device.
        traffic: Bytes that one device sends in a step.
        communication: Seconds of communication of one step, alone.
        seconds: Seconds of one step; communication beyond the backward pass is not hidden, nor are
            the matrix products of the optimizer.
        run_seconds: Seconds of all steps. The step above is one of the last batch size.
        optimizer: What Muon adds to the step; nothing for AdamW.
    """

    stage: int
    checkpointing: bool
    memory: MemoryEstimate
    fits: bool
    traffic: float
    communication: float
    seconds: float
    run_seconds: float
    optimizer: OptimizerWork


@dataclass(frozen=True)
class Plan:
    """Estimates of a run on `devices` devices at a given model FLOPs utilization.

    Attributes:
        tokens_per_step: Of the steps of the last batch size.
        accumulation: Micro-batches per device of these steps.
        compute_seconds: Compute of one of them, without recomputation.
    """

    config: Config
    machine: Machine
    devices: int
    utilisation: float
    counts: Counts
    tokens_per_step: int
    accumulation: int
    compute_seconds: float
    options: list[Option]

    @property
    def usable(self) -> float:
        """Bytes of a device that the run may fill."""
        return (1 - RESERVED) * self.machine.memory

    @property
    def best(self) -> Option | None:
        """The fastest option that fits; of equally fast ones the lowest stage."""
        fitting = [option for option in self.options if option.fits]
        return min(
            fitting, key=lambda o: (round(o.seconds, 6), o.stage, o.checkpointing), default=None
        )

    @property
    def total_tokens(self) -> int:
        """Training tokens of the run."""
        return self.config.total_tokens

    def tokens_per_second(self, option: Option) -> float:
        """Throughput of all devices."""
        return self.tokens_per_step / option.seconds

    def days(self, option: Option) -> float:
        """Days of training steps, without validation, checkpoints and failures."""
        return option.run_seconds / 86400


def plan(config: Config, devices: int, machine: Machine, utilisation: float) -> Plan:
    """Plan a run.

    Args:
        config: The run.
        devices: Number of devices, one rank on each.
        machine: The device.
        utilisation: Model FLOPs utilization (MFU) without recomputation, from 0 to 1 (PaLM).

    Raises:
        ConfigError: The batch cannot be divided among the devices, or a node into groups of
            `train.hpz_ranks`.
    """
    last_step = config.total_steps - 1
    accumulation = config.accumulation_steps(devices, last_step)
    if devices > machine.node_size and machine.node_size % (config.train.hpz_ranks or 1):
        raise ConfigError(
            f"train.hpz_ranks = {config.train.hpz_ranks} does not divide the {machine.node_size}"
            " devices of a node (--node-size); give the ranks of one node, or a divisor of them"
        )
    counts = count(ModelSpec.from_config(config), config.data.sequence_length)
    sequence_seconds = (
        counts.training_flops_per_token
        * config.data.sequence_length
        / (devices * machine.peak * utilisation)
    )
    options = []
    for stage in range(4):
        if stage == 0 and config.train.precision == "bf16":
            continue  # refused by the config, with the reason
        cost = step_cost(variant(config, stage, False), devices)
        options += [
            _option(changed, devices, machine, utilisation, sequence_seconds, cost)
            for changed in (
                variant(config, stage, checkpointing) for checkpointing in (False, True)
            )
        ]
    sequences = config.batches.batch_size(last_step)
    return Plan(
        config,
        machine,
        devices,
        utilisation,
        counts,
        sequences * config.data.sequence_length,
        accumulation,
        sequences * sequence_seconds,
        options,
    )


def variant(config: Config, stage: int, checkpointing: bool) -> Config:
    """Return the config at another stage."""
    train = config.train.model_copy(
        update={"zero_stage": stage, "activation_checkpointing": checkpointing}
    )
    return config.model_copy(update={"train": train})


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in an optimizer step.

    Attributes:
        everywhere: In collectives of all devices.
        in_node: In collectives of the ranks of one node.
        in_optimizer: Among all devices, within the optimizer's step.
    """

    everywhere: float
    in_node: float = 0.0
    in_optimizer: float = 0.0

    @property
    def total(self) -> float:
        """Bytes in all collectives."""
        return self.everywhere + self.in_node + self.in_optimizer


def step_cost(config: Config, devices: int, device_type: str = "cuda") -> StepCost:
    """Return what the optimizer's step costs beyond elementwise work, by rank."""
    shapes, spec = parameter_shapes(ModelSpec.from_config(config)), optimizer_spec(config)
    units = zero_layout(spec, shapes, config.train.zero_stage, devices)
    return spec.step_cost(units, devices, device_type)


def traffic(
    config: Config,
    devices: int,
    device_type: str = "cuda",
    step: int = 0,
    cost: StepCost | None = None,
) -> Traffic:
    """Return the bytes that one device sends in the step at index `step`, with ring algorithms.

    One pass of a ring sends (N - 1)/N of the data. arXiv 1910.02054 section 7, as in
    DeepSpeed 0.19.8 and with our dtypes (tests/cluster/test_traffic.py counts it): gradients travel
    in fp32, weights in the width of training. All ranks get all gradients at stages 0 to 2, two
    passes each, once per step (0, 1) or per micro-batch (2); at stage 3 each gets its own, one pass
    per micro-batch. Stage 3 gathers the weights for the forward pass of every micro-batch, and
    again for the backward pass when they are too many to stay gathered; with hpZ (arXiv 2306.10209)
    only the first of these is among all ranks, and the others are inside a node. Small parameters,
    which stay gathered, are not taken off. What the optimizer exchanges is that of the rank that
    sends most, without a ring.

    Args:
        config: The run.
        devices: Number of devices.
        device_type: "cpu" or "cuda"; an optimizer's exchange may be in another dtype.
        step: Index of the step, for a batch schedule.
        cost: `step_cost` of the same, where it is known.
    """
    train, n, micro = (
        config.train,
        count(ModelSpec.from_config(config)).parameters,
        config.accumulation_steps(devices, step),
    )
    weights, gradients = n * (2 if train.precision == "bf16" else 4), 4 * n
    gathers = micro * (2 if n > LIVE_PARAMETERS else 1)
    everywhere = 1 if train.hpz_ranks else gathers
    volume = {
        0: 2 * gradients,
        1: 2 * gradients + weights,
        2: micro * 2 * gradients + weights,
        3: everywhere * weights + micro * gradients,
    }[train.zero_stage]
    inside = (gathers - everywhere) * weights if train.zero_stage == 3 else 0
    return Traffic(
        everywhere=volume * _ring(devices),
        in_node=inside * _ring(train.hpz_ranks or 1),
        in_optimizer=max((cost or step_cost(config, devices, device_type)).sent_bytes),
    )


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _option(
    config: Config,
    devices: int,
    machine: Machine,
    utilisation: float,
    sequence_seconds: float,
    cost: StepCost,
) -> Option:
    """Estimate one option.

    Args:
        config: The run, at the option's stage, with or without activation checkpointing.
        devices: Number of devices.
        machine: The device.
        utilisation: Share of the device's peak that matrix products reach, 0 to 1.
        sequence_seconds: Compute of one sequence on all devices, without recomputation.
        cost: `step_cost` of the same.
    """
    stage, checkpointing = config.train.zero_stage, config.train.activation_checkpointing
    memory = estimate_memory(config, devices, device="cuda")
    sent_bytes, flops = max(cost.sent_bytes), max(cost.flops)
    optimizer = OptimizerWork(
        sent_bytes,
        sent_bytes / machine.direct(devices),
        flops,
        flops / (machine.peak * utilisation),
    )
    run_seconds = 0.0
    for first, last, batch_size in config.batches.phases(config.total_steps):
        sent = traffic(config, devices, step=first, cost=cost)
        communication = sent.everywhere / machine.bus(devices) + sent.in_node / machine.bus(
            config.train.hpz_ranks or 1
        )
        work = sequence_seconds * batch_size * (1 + RECOMPUTE * checkpointing)
        # Stages 0 and 1 reduce after the last backward pass; only stages 2 and 3 send while others
        # compute.
        hidden = BACKWARD * work if stage >= 2 else 0.0
        seconds = work + max(communication - hidden, 0.0)
        seconds += optimizer.exchange_seconds + optimizer.seconds
        run_seconds += (last - first) * seconds
    return Option(
        stage,
        checkpointing,
        memory,
        memory.total <= (1 - RESERVED) * machine.memory,
        sent.total,
        communication + optimizer.exchange_seconds,
        seconds,
        run_seconds,
        optimizer,
    )
