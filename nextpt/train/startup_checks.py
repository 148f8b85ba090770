"""Checks of kernels and hosts before the model is built."""

from __future__ import annotations

from typing import Any

import torch

from kernels.attention.comparison import difference
from kernels.attention.interface import FUNCTIONS
from kernels.causality import CausalityError, check_attention
from kernels.choice import attention_features, choose_attention, choose_cross_entropy
from nextpt.base.errors import ConfigError, UserError
from nextpt.config import Config
from nextpt.model import ModelSpec
from nextpt.train.memory import loss_chunking


def attention_features_of(config: Config, device: str) -> dict[int | None, set[str]]:
    """Return what the attention of the layers has to do, by window, as `kernels.choice` names it.

    Args:
        config: The run.
        device: Type of the torch device.
    """
    spec, dtype = ModelSpec.from_config(config), attention_dtype(config, device)
    head = torch.empty(1, 1, 1, spec.head_dim, dtype=dtype, device="meta")
    return {
        window: attention_features(
            head, head, documents=True, window=window, sinks=spec.attention_sinks or None
        )
        for window in dict.fromkeys(spec.windows)
    }


def attention_dtype(config: Config, device: str) -> torch.dtype:
    """The dtype of queries, keys and values on a type of device."""
    narrow = config.train.precision == "bf16" and device == "cuda"
    return torch.bfloat16 if narrow else torch.float32


def check_causality(config: Config, device: torch.device) -> None:
    """Prove on this device that no layer's attention looks ahead, and that its kernels are right.

    In the shapes of the run's own heads, so that a kernel that does not fit the device fails now.
    Takes a fraction of a second.

    Raises:
        ConfigError: When the chosen implementation cannot do what the run needs, or, on CUDA or in
            Triton, fails or differs from the reference.
        UserError: When the attention is not causal.
    """
    spec, implementation = ModelSpec.from_config(config), config.model.attention
    dtype = attention_dtype(config, device.type)
    try:
        for window, features in attention_features_of(config, device.type).items():
            heads: dict[str, Any] = {
                "window": window,
                "sinks": spec.attention_sinks,
                "head_dim": spec.head_dim,
                "group": spec.heads // spec.kv_heads,
            }
            chosen = choose_attention(implementation, device.type, features)
            if device.type == "cuda" or chosen.name == "triton":
                reason = difference(FUNCTIONS[chosen.name], device, dtype, **heads)
                if reason:
                    raise ValueError(
                        f"{chosen.name} does not suit heads of {spec.head_dim} on this"
                        f" {device.type}: {reason}; set another model.attention"
                    )
            check_attention(implementation, device, dtype, **heads)
    except ValueError as error:
        raise ConfigError(f"model.attention = {config.model.attention}: {error}") from error
    except CausalityError as error:
        raise UserError(
            f"the attention of this installation is not causal: {error}; choose another"
            " model.attention"
        ) from error


def check_cross_entropy(config: Config, device: torch.device) -> None:
    """Refuse a cross-entropy that cannot run on this device.

    Raises:
        ConfigError: When the implementation or its chunks do not fit.
    """
    try:
        dtype = torch.bfloat16 if config.train.precision == "bf16" else None
        choose_cross_entropy(config.model.cross_entropy, device.type, dtype)
    except ValueError as error:
        raise ConfigError(f"model.cross_entropy = {config.model.cross_entropy}: {error}") from error
    loss_chunking(config, device.type)


def check_hpz(config: Config, hosts: list[str]) -> None:
    """Refuse groups of `train.hpz_ranks` over several hosts: they would gather over the network.

    Args:
        config: The run.
        hosts: Host name of every rank, in order of rank.

    Raises:
        ConfigError: With the ranks and hosts of the first such group.
    """
    size = config.train.hpz_ranks or 1
    for first in range(0, len(hosts), size):
        if len(names := dict.fromkeys(hosts[first : first + size])) > 1:
            raise ConfigError(
                f"train.hpz_ranks = {size}: ranks {first} to {first + size - 1} are on different"
                f" hosts ({', '.join(names)}); give the number of ranks of one host, or a divisor"
                " of it"
            )
