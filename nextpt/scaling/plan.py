"""What a run will take, before any GPU hour is spent: memory, time and traffic for every ZeRO stage.

Nothing is measured here and nothing starts; a config is planned for any number of devices, on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from nextpt.config import Config
from nextpt.model import Counts, count
from nextpt.scaling.machines import Machine
from nextpt.train.memory import MemoryEstimate, estimate_memory

# Kept free: CUDA context, NCCL's buffers, fragmentation of the allocator. An assumption, not measured.
RESERVED = 0.10
BACKWARD = 2 / 3  # of the compute of a step, in which gradients can travel (arXiv 2001.08361: backward is twice forward)
RECOMPUTE = 1 / 3  # more compute with activation checkpointing: one more forward pass (arXiv 1604.06174)


@dataclass(frozen=True)
class Option:
    """One way to run: a ZeRO stage with or without activation checkpointing.

    traffic: bytes that one device sends in a step. communication, seconds: of one step, alone and as planned, where
    what exceeds the backward pass is not hidden.
    """

    stage: int
    checkpointing: bool
    memory: MemoryEstimate
    fits: bool
    traffic: float
    communication: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """All that is known of a run on `devices` devices at a stated utilisation."""

    config: Config
    machine: Machine
    devices: int
    utilisation: float
    counts: Counts
    accumulation: int
    compute_seconds: float
    options: list[Option]

    @property
    def usable(self) -> float:
        """Bytes of a device that the run may fill."""
        return (1 - RESERVED) * self.machine.memory

    @property
    def best(self) -> Option | None:
        """The quickest option that fits; of equally quick ones the lowest stage."""
        fitting = [option for option in self.options if option.fits]
        return min(fitting, key=lambda o: (round(o.seconds, 6), o.stage, o.checkpointing), default=None)

    @property
    def total_tokens(self) -> int:
        return self.config.total_steps * self.config.tokens_per_step

    def tokens_per_second(self, option: Option) -> float:
        return self.config.tokens_per_step / option.seconds

    def days(self, option: Option) -> float:
        """Days of stepping; validation, saving and failures come on top."""
        return self.config.total_steps * option.seconds / 86400


def plan(config: Config, devices: int, machine: Machine, utilisation: float) -> Plan:
    """Plan a run. utilisation: model FLOP utilisation without recomputation, as a share of the peak (PaLM's definition).

    Raises ConfigError when the batch cannot be divided among the devices.
    """
    accumulation = config.accumulation_steps(devices)
    counts = count(config)
    compute = counts.training_flops_per_token * config.tokens_per_step / (devices * machine.peak * utilisation)
    options = [
        _option(config, devices, machine, compute, stage, checkpointing)
        for stage in range(4) if not (stage == 0 and config.train.precision == "bf16")  # refused by the config, with the reason
        for checkpointing in (False, True)
    ]
    return Plan(config, machine, devices, utilisation, counts, accumulation, compute, options)


def variant(config: Config, stage: int, checkpointing: bool) -> Config:
    """The config at another stage."""
    train = config.train.model_copy(update={"zero_stage": stage, "activation_checkpointing": checkpointing})
    return config.model_copy(update={"train": train})


def traffic(config: Config, devices: int) -> float:
    """Bytes that one device sends in an optimizer step, by the ring algorithms: (N - 1)/N of the data per pass.

    arXiv 1910.02054 section 7, with our widths: gradients travel in fp32, weights in the width of training. Stages 0 and
    1 reduce once per step, 2 and 3 once per micro-batch; stage 3 gathers the weights for forward and for backward of
    every micro-batch.
    """
    n, stage, micro = count(config).parameters, config.train.zero_stage, config.accumulation_steps(devices)
    weights, gradients = n * (2 if config.train.precision == "bf16" else 4), 4 * n
    volume = {
        0: 2 * gradients,
        1: (2 if config.train.precision == "bf16" else 1) * gradients + weights,
        2: micro * gradients + weights,
        3: micro * (2 * weights + gradients),
    }[stage]
    return volume * (devices - 1) / devices


def _option(config: Config, devices: int, machine: Machine, compute: float, stage: int, checkpointing: bool) -> Option:
    changed = variant(config, stage, checkpointing)
    memory = estimate_memory(changed, devices, device="cuda")
    sent = traffic(changed, devices)
    communication = sent / machine.bus(devices)
    work = compute * (1 + RECOMPUTE * checkpointing)
    # Stages 0 and 1 reduce after the last backward pass; only stages 2 and 3 send while others compute.
    hidden = BACKWARD * work if stage >= 2 else 0.0
    return Option(stage, checkpointing, memory, memory.total <= (1 - RESERVED) * machine.memory, sent, communication,
                  work + max(communication - hidden, 0.0))
