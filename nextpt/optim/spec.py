"""OptimizerSpec: what an optimizer is to checkpoints, memory estimates, metrics and the engine.

A new optimizer is one module with a subclass of `PerParameterSpec` (`per_parameter.py`), one line
in `registry.py` and its section of the config. It describes

- its groups of parameters, and which kinds of state a parameter of each group has;
- its step, as a pure function of (weight, gradient, state);
- its last update, for the update-ratio metric.

Clipping, the guard against bad steps, saving, loading, resharding and the memory estimate follow
from these. An optimizer with a kernel of its own subclasses `OptimizerSpec` (see `adamw.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from nextpt.config import OptimizerSection
from nextpt.model import Parametrization
from nextpt.optim.matrix_exchange import DividedTensor

if TYPE_CHECKING:
    from nextpt.optim.guarded import GuardedOptimizer

# In a checkpoint the parameter itself; in an optimizer's state the count of updates
RESERVED = ("weight", "step")
Shape = tuple[int, ...]
# Returns the gradient norm of the step under way over all ranks (fp32 scalar, before clipping) and
# whether the step must change nothing (bool scalar). A norm that is negative or not finite comes
# with true. An engine may step group by group, so it is called several times in one step.
Verdict = Callable[[], tuple[Tensor, Tensor]]


def like_parameter(shape: Shape) -> Shape:
    """Shape of a state with one value per element of the parameter."""
    return shape


def one_value(shape: Shape) -> Shape:
    """Shape of a state with a single value per parameter."""
    return ()


@dataclass(frozen=True)
class StateKind:
    """One kind of optimizer state. It starts at zero.

    State with the parameter's shape is divided among ranks as the parameter is. State of any other
    shape is held whole by every rank that holds a part of the parameter. All of them compute it
    equally, or `GuardedOptimizer.owner` says whose counts.

    Attributes:
        name: Name in checkpoints.
        shape: Full shape of the state as a function of the parameter's full shape.
        dtype: Type in memory; checkpoints hold fp32.
    """

    name: str
    shape: Callable[[Shape], Shape] = like_parameter
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        assert self.name not in RESERVED, f"a kind of state cannot be named {self.name!r}"

    def is_elementwise(self, shape: Shape) -> bool:
        """Whether the state of a parameter of this shape is divided as the parameter is."""
        return self.shape(shape) == shape


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimizer treats alike.

    Attributes:
        name: Unique among the groups of an optimizer.
        kinds: Kinds of state that each of its parameters has.
        options: Options of the group, e.g. `weight_decay`.
        lr_factor: Its learning rate / that of the step, whose peak is `optimizer.lr`.
    """

    name: str
    kinds: tuple[StateKind, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0


@dataclass(frozen=True)
class StepCost:
    """What a step of an optimizer costs beyond elementwise work, by rank.

    Attributes:
        flops: FLOPs of matrix products.
        sent_bytes: Bytes that the rank sends to others.
    """

    flops: tuple[float, ...]
    sent_bytes: tuple[int, ...]


class OptimizerSpec(ABC):
    """Description of one optimizer. See the module's docstring.

    Args:
        section: The config's section `optimizer`.
        rules: What follows from the model's shape; nothing unless given.
    """

    kind: ClassVar[str]

    def __init__(self, section: OptimizerSection, rules: Parametrization | None = None) -> None:
        self.section = section
        self.rules = rules or Parametrization()

    @property
    @abstractmethod
    def groups(self) -> Sequence[ParameterGroup]:
        """Groups of parameters, in the order in which they are stepped."""

    @abstractmethod
    def group_of(self, name: str, shape: Shape) -> ParameterGroup:
        """Group of the parameter with this name and full shape; one of `groups`."""

    @abstractmethod
    def last_update(
        self,
        weight: Tensor,
        state: Mapping[str, Tensor],
        options: Mapping[str, Any],
        updates: float,
    ) -> Tensor:
        """What the last step subtracted from the weights, computed from the state after it.

        Args:
            weight: fp32 [n], after the step.
            state: Kind -> value after the step.
            options: The group's options and `lr`.
            updates: Number of steps that the optimizer has made, at least 1.
        """

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], verdict: Verdict) -> GuardedOptimizer:
        """The optimizer that the engine steps.

        Args:
            groups: torch's parameter groups, as `torch_groups` returns them.
            verdict: Gradient norm and verdict of the step under way.
        """

    def names_by_group(self, shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
        """Names of the parameters of each group, in the order of `groups`, empty ones included.

        Args:
            shapes: Full shape of every parameter.
        """
        names: dict[str, list[str]] = {group.name: [] for group in self.groups}
        for name, shape in shapes.items():
            names[self.group_of(name, shape).name].append(name)
        return names

    def torch_groups(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Divide parameters into torch's parameter groups; empty groups are left out.

        Under ZeRO-3 a parameter's own shape is empty and `ds_shape` is the full one.
        """
        by_name = dict(parameters)
        names = self.names_by_group(
            {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in by_name.items()}
        )
        return [
            {
                "params": [by_name[name] for name in names[group.name]],
                "name": group.name,
                "lr_factor": group.lr_factor,
                **group.options,
            }
            for group in self.groups
            if names[group.name]
        ]

    def step_cost(
        self, units: Iterable[Sequence[DividedTensor]], ranks: int, device_type: str
    ) -> StepCost:
        """Cost of one step; nothing for an optimizer that is elementwise.

        Args:
            units: The parameters, by what is stepped in one call; see `GuardedOptimizer.connect`.
            ranks: Number of ranks that they are divided among.
            device_type: "cpu" or "cuda".
        """
        return StepCost((0.0,) * ranks, (0,) * ranks)

    def state_shapes(self, name: str, shape: Shape) -> dict[str, Shape]:
        """Full shape of each kind of state of a parameter."""
        return {kind.name: kind.shape(shape) for kind in self.group_of(name, shape).kinds}

    def state_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Bytes of the whole state of parameters with these names and full shapes."""
        return sum(
            math.prod(kind.shape(shape)) * kind.dtype.itemsize
            for name, shape in shapes.items()
            for kind in self.group_of(name, shape).kinds
        )
