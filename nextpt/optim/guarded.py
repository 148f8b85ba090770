"""Guarded optimizers: clipping on the device, and a bad step changes nothing.

An engine may give an optimizer flat tensors that hold parts of many parameters (ZeRO) instead of
the parameters themselves. `Shard` says which part of a flat tensor belongs to which parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nextpt.optim.spec import OptimizerSpec, Shape, StateKind, Verdict

# Elements of a parameter whose last update is computed at a time, so that it takes little memory
CHUNK = 2**24


@dataclass(frozen=True)
class Shard:
    """The part of one parameter that this rank steps.

    Attributes:
        name: The parameter.
        shape: Its full shape.
        flat: fp32 tensor that the optimizer steps, which holds the part.
        offset: First element of the part in `flat`.
        start: First flat element of the parameter that the part holds.
        length: Number of elements, at least 1.
    """

    name: str
    shape: tuple[int, ...]
    flat: Tensor
    offset: int
    start: int
    length: int

    def view(self, tensor: Tensor) -> Tensor:
        """1-D view of the part in a tensor that has the elements of `flat`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]


class GuardedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose state can be saved, loaded and divided anew by parameter.

    `state[flat]` holds "step", the number of updates of a flat tensor (fp32 scalar), and the kinds
    of state that have their parameter's shape. State of other shapes is in `whole_state`.
    """

    spec: OptimizerSpec
    verdict: Verdict

    def guard(self, spec: OptimizerSpec, verdict: Verdict) -> None:
        """Set what each step asks for; called once by the constructor of a subclass."""
        self.spec, self.verdict = spec, verdict
        self.shards: dict[Tensor, list[Shard]] = {}
        self.whole_state: dict[str, dict[str, Tensor]] = {}

    def clip_factor(self, norm: Tensor, bad: Tensor) -> Tensor:
        """Number that gradients are divided by to have at most the norm `optimizer.grad_clip`.

        It is 1 in a bad step: an infinite norm must not become NaN in a tensor that is then not
        taken.
        """
        limit = self.spec.section.grad_clip
        factor = (norm / limit).clamp(min=1.0) if limit else torch.ones_like(norm)
        return torch.where(bad, torch.ones_like(factor), factor)

    def attach(self, flats: Iterable[Tensor], shards: Iterable[Shard]) -> None:
        """Create zero state for every tensor that is stepped, and set the counts of updates to 0.

        So saving and loading see the same state at any time. Called once, before the first step.

        Args:
            flats: The tensors that the engine steps.
            shards: The parts of parameters that they hold.
        """
        for shard in shards:
            self.shards.setdefault(shard.flat, []).append(shard)
            for kind in self.kinds(shard):
                if not kind.is_elementwise(shard.shape):
                    self.whole_state.setdefault(shard.name, {})[kind.name] = torch.zeros(
                        kind.shape(shard.shape), dtype=kind.dtype, device=shard.flat.device
                    )
        for flat in flats:
            state = self.state[flat]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                for kind in self._elementwise_kinds(flat):
                    state[kind.name] = torch.zeros_like(
                        flat, dtype=kind.dtype, memory_format=torch.preserve_format
                    ).detach()
            state["step"].zero_()

    def connect(
        self,
        shapes: Mapping[str, Shape],
        units: Sequence[Sequence[Tensor]],
        group: dist.ProcessGroup | None,
    ) -> None:
        """Prepare for exchanges with other ranks within a step; most optimizers need none.

        Called once, after `attach`. Collective; waits for the device.

        Args:
            shapes: Full shape of every parameter of the model, in the same order on all ranks.
            units: The tensors of each parameter group that are stepped in one call of `step`, in
                the same order on all ranks.
            group: The ranks that the parameters are divided among; None for a process by itself.
        """

    def owner(self, name: str) -> int | None:
        """Rank whose state of a parameter counts, where that state has not the parameter's shape.

        None where all ranks that hold it compute it equally.
        """
        return None

    def shard_state(self, shard: Shard, elements: slice = slice(None)) -> dict[str, Tensor]:
        """Kind -> state of a shard, in memory shared with the optimizer.

        Args:
            shard: A part of a parameter.
            elements: Which elements of the part.

        Returns:
            1-D tensors for kinds with the parameter's shape; the others in their own shape.
        """
        state = self.state[shard.flat]
        return {
            kind.name: shard.view(state[kind.name])[elements]
            if kind.is_elementwise(shard.shape)
            else self.whole_state[shard.name][kind.name]
            for kind in self.kinds(shard)
        }

    def last_update_squares(self, shard: Shard, lr: float, updates: float) -> Tensor:
        """Squared norms of the last update of a shard and of its weights, fp64 [2].

        Args:
            shard: A part of a parameter.
            lr: Learning rate of the step.
            updates: Number of steps that the optimizer has made, at least 1.
        """
        group = self.spec.group_of(shard.name, shard.shape)
        options = {**group.options, "lr": lr * group.lr_factor}
        weights = shard.view(shard.flat)
        total = torch.zeros(2, dtype=torch.float64, device=weights.device)
        for start in range(0, shard.length, CHUNK):
            chunk = slice(start, start + CHUNK)
            state = self.shard_state(shard, chunk)
            update = self.spec.last_update(weights[chunk], state, options, updates)
            total += torch.stack([squared_norm(update), squared_norm(weights[chunk])])
        return total

    def scalars(self) -> dict[str, float]:
        """Numbers of a checkpoint that belong to no parameter; waits for the device."""
        counts = (float(state["step"]) for state in self.state.values())
        return {"optimizer_updates": max(counts, default=0.0)}

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Continue from the scalars of a checkpoint."""
        for state in self.state.values():
            state["step"].fill_(scalars["optimizer_updates"])

    def kinds(self, shard: Shard) -> tuple[StateKind, ...]:
        """Kinds of state of a shard."""
        return self.spec.group_of(shard.name, shard.shape).kinds

    def _elementwise_kinds(self, flat: Tensor) -> Sequence[StateKind]:
        """Kinds of the parameters in a flat tensor; all kinds where it holds only padding."""
        kinds = [
            kind
            for shard in self.shards.get(flat, [])
            for kind in self.kinds(shard)
            if kind.is_elementwise(shard.shape)
        ]
        if flat not in self.shards:
            kinds = [kind for group in self.spec.groups for kind in group.kinds]
        return list({kind.name: kind for kind in kinds}.values())


def squared_norm(tensor: Tensor) -> Tensor:
    """Sum of squares of a 1-D tensor, fp64 scalar; converts `CHUNK` elements at a time."""
    return torch.stack(
        [chunk.double().square().sum() for chunk in torch.split(tensor, CHUNK)]
    ).sum()
