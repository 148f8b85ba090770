"""Choice of implementations: what each can do, the order of choice, the reasons for a refusal.

One table for causal attention and one for the vocabulary's cross-entropy. A name chooses one
implementation, which is refused with every reason that it cannot be used; "auto" chooses the first
of the device's order that can do what is asked. Nothing is imported here before it is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

WIDEST_HEAD = 256  # elements, for kernels that keep a tile of a head in registers
BF16 = "bf16"  # a feature of all implementations, where they are not interpreted
SHAPES_AND_TYPES = ("fp32", "fp64", "heads wider than 256", "values of another width than keys")
# Beside those: "documents", "documents without cu_seqlens", "window", "softcap", "sinks", "lse" and
# "offsets" (queries and keys that do not end at the same position).


def _always_available() -> str | None:
    return None


def _package_missing(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    return None


def _varlen_unavailable() -> str | None:
    from kernels.attention import flash

    return flash.torch_unavailable()


def _triton_attention_unavailable() -> str | None:
    if missing := _package_missing("triton"):
        return missing
    from kernels.attention import triton_attention

    return triton_attention.failure_on_gpu()


@dataclass(frozen=True)
class Implementation:
    """What one implementation of an operator needs and can do.

    Attributes:
        name: how a call and a config name it.
        devices: types of torch devices that it runs on.
        features: what it can do beyond the plain 16-bit case.
        slow_on_cuda: features for which it needs a dense mask of S x S there, or has no kernel;
            "auto" does not choose it for those.
        interpreted: it also runs on a CPU where Triton interprets kernels (TRITON_INTERPRET=1).
        unavailable: returns why it cannot be used in this process, or None.
    """

    name: str
    devices: frozenset[str]
    features: frozenset[str] = frozenset()
    slow_on_cuda: frozenset[str] = frozenset()
    interpreted: bool = False
    unavailable: Callable[[], str | None] = _always_available

    def refusals(self, device: str, features: Iterable[str] = ()) -> list[str]:
        """Return the reasons not to use it, as phrases; empty where it can be used."""
        reason = self.unavailable()
        reasons = [reason] if reason else []
        interpreted = device == "cpu" and self.interpreted and not reason and _interprets()
        if device not in self.devices and not interpreted:
            reasons.append(f"it does not run on {device}")
        if interpreted and BF16 in features:
            reasons.append("Triton's interpreter computes in bf16 wrongly")
        lacking = sorted(set(features) - self.features - {BF16})
        return reasons + [f"it has no {feature}" for feature in lacking]


def _interprets() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _table(*implementations: Implementation) -> dict[str, Implementation]:
    return {implementation.name: implementation for implementation in implementations}


_CPU_AND_CUDA, _CUDA = frozenset({"cpu", "cuda"}), frozenset({"cuda"})
_MASKS = ("documents", "documents without cu_seqlens", "window", "offsets")

ATTENTION = _table(
    Implementation(
        "reference",
        _CPU_AND_CUDA,
        frozenset({*_MASKS, "softcap", "sinks", "lse", *SHAPES_AND_TYPES}),
    ),
    Implementation(
        "sdpa",
        _CPU_AND_CUDA,
        frozenset({*_MASKS, *SHAPES_AND_TYPES}),
        slow_on_cuda=frozenset({*_MASKS, "fp64"}),
    ),
    Implementation(
        "varlen",
        _CUDA,
        frozenset({"documents", "window"}),
        unavailable=_varlen_unavailable,
    ),
    Implementation(
        "flash_attn",
        _CUDA,
        frozenset({"documents", "window", "softcap"}),
        unavailable=partial(_package_missing, "flash_attn"),
    ),
    Implementation(
        "triton",
        _CUDA,
        frozenset(
            {*_MASKS, "softcap", "sinks", "lse", "fp32", "values of another width than keys"}
        ),
        interpreted=True,
        unavailable=_triton_attention_unavailable,
    ),
    Implementation(
        "flex",
        _CUDA,
        frozenset({*_MASKS, "softcap", "sinks", "lse", "fp32"}),
        unavailable=partial(_package_missing, "triton"),
    ),
)
# On CUDA ours stands behind all of torch's as long as it has not run on a GPU (bench/PENDING.md);
# on a CPU it would be interpreted.
ATTENTION_ORDER = {
    "cuda": ("sdpa", "flash_attn", "varlen", "flex", "triton", "reference"),
    "cpu": ("sdpa", "reference"),
}

CROSS_ENTROPY = _table(
    Implementation("reference", _CPU_AND_CUDA),
    Implementation("torch", _CPU_AND_CUDA),
    Implementation(
        "triton", _CUDA, interpreted=True, unavailable=partial(_package_missing, "triton")
    ),
)
CROSS_ENTROPY_ORDER = {"cuda": ("triton", "torch"), "cpu": ("torch",)}


def choose_attention(name: str, device: str, features: Iterable[str] = ()) -> Implementation:
    """Choose the implementation of attention for a type of device and `attention_features`.

    Raises:
        ValueError: as `choose`.
    """
    return choose(ATTENTION, ATTENTION_ORDER, name, device, features)


def choose_cross_entropy(
    name: str, device: str, dtype: torch.dtype | None = None
) -> Implementation:
    """Choose the implementation of the vocabulary's cross-entropy for a type of device.

    Args:
        name: as of `choose`.
        device: as of `choose`.
        dtype: of the hidden states, where it is known.

    Raises:
        ValueError: as `choose`.
    """
    features = {BF16} if dtype == torch.bfloat16 else ()
    return choose(CROSS_ENTROPY, CROSS_ENTROPY_ORDER, name, device, features)


def attention_features(q: Tensor, v: Tensor, **options: object) -> set[str]:
    """Return the features that a call of attention needs.

    Args:
        q: queries [B, Sq, Hq, D].
        v: values [B, Sk, Hkv, Dv].
        options: named as features; those that are not None are needed.
    """
    needed = {
        BF16: q.dtype == torch.bfloat16,
        "fp32": q.element_size() == 4,
        "fp64": q.element_size() == 8,
        "heads wider than 256": max(q.shape[3], v.shape[3]) > WIDEST_HEAD,
        "values of another width than keys": q.shape[3] != v.shape[3],
    } | {name: value is not None for name, value in options.items()}
    return {name for name, is_needed in needed.items() if is_needed}


def choose(
    table: Mapping[str, Implementation],
    orders: Mapping[str, Iterable[str]],
    name: str,
    device: str,
    features: Iterable[str] = (),
) -> Implementation:
    """Choose an implementation by name, or for "auto" the first of the device's order that can.

    Args:
        table: implementations by name.
        orders: names by type of device, best first; "cpu" stands for other devices too.
        name: a key of `table`, or "auto".
        device: type of the torch device.
        features: what the implementation must be able to do.

    Raises:
        ValueError: the name is unknown, or nothing that it stands for can do what is asked; the
            message says why.
    """
    features = set(features)
    if name == "auto":
        for candidate in orders.get(device, orders["cpu"]):
            slow = device == "cuda" and features & table[candidate].slow_on_cuda
            if not slow and not table[candidate].refusals(device, features):
                return table[candidate]
        raise ValueError(f"no implementation on {device} has all of: {', '.join(sorted(features))}")
    if name not in table:
        raise ValueError(
            f"unknown implementation {name!r}; there are auto, {', '.join(sorted(table))}"
        )
    if reasons := table[name].refusals(device, features):
        raise ValueError(f"implementation {name!r} cannot be used here: {'; '.join(reasons)}")
    return table[name]
