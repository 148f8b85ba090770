"""Exponential moving averages of the weights (train.ema), as further kinds of state.

After the n-th accepted step an average moves by (1 - d) / (1 - d**n) of its distance to the
weights: the average with decay d and without a share of the initial weights (the bias correction
of arXiv 1412.6980). It is elementwise on the fp32 tensors that the optimizer steps, so it is
divided among ranks as they are, and equal at every ZeRO stage. A bad step moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nextpt.checkpoint.state import Fragment, FragmentReader, average_kind
from nextpt.optim.guarded import GuardedOptimizer
from nextpt.parallel.mesh import Mesh
from nextpt.train.zero_state import ZeroState

CHUNK = 2**24  # elements that are moved at a time, so that it takes little memory


class AveragedState(ZeroState):
    """The state of a model that DeepSpeed trains, with averages of its weights.

    Args:
        decays: Decay of each average; none for no averages.
        parameters: See `ZeroState`, as for the others.
        optimizer: See `ZeroState`.
        zero: See `ZeroState`.
        stage: See `ZeroState`.
        mesh: See `ZeroState`.
    """

    def __init__(
        self,
        decays: Sequence[float],
        parameters: dict[str, nn.Parameter],
        optimizer: GuardedOptimizer,
        zero: Any | None,
        stage: int,
        mesh: Mesh,
    ) -> None:
        super().__init__(parameters, optimizer, zero, stage, mesh)
        flats = list({id(shard.flat): shard.flat for shard in self.shards()}.values())
        self._averages = {
            decay: {flat: torch.zeros_like(flat, requires_grad=False) for flat in flats}
            for decay in decays
        }
        device = self._flat_tensors()[0].device
        # Accepted steps that each average has seen
        self._seen = {
            decay: torch.zeros((), dtype=torch.float64, device=device) for decay in decays
        }

    @torch.no_grad()
    def update_averages(self, bad: Tensor) -> None:
        """Move the averages after a step, without waiting for the device.

        Args:
            bad: Whether the step changed nothing, bool scalar.
        """
        for decay, averages in self._averages.items():
            seen = self._seen[decay]
            seen += ~bad
            share = ((1 - decay) / (1 - decay**seen)).float()
            for flat, average in averages.items():
                weights, values = flat.detach().view(-1), average.view(-1)
                for start in range(0, len(values), CHUNK):
                    part = values[start : start + CHUNK]
                    # In three operations: a fused one may round the ends of a tensor otherwise
                    # than its middle, and another division of it would give other averages.
                    moved = part + (weights[start : start + CHUNK] - part) * share
                    # Selected, not multiplied by 0, which would lose the sign of a zero.
                    part.copy_(torch.where(bad, part, moved))

    def begun_averages(self) -> list[float]:
        """Decays of the averages that have seen a step; waits for the device."""
        return [decay for decay, seen in self._seen.items() if float(seen) > 0]

    @contextmanager
    def averaged_weights(self, decay: float) -> Iterator[None]:
        """Compute with an average in the place of the weights. Collective.

        Weights and average change places, which takes no memory, and change back at the end. After
        an exception the fp32 weights and the averages are right, which is the state that is saved;
        the working weights are not: to gather them would wait for ranks that may not come.
        """
        self._exchange(decay)
        try:
            self._update_working_weights()
            yield
        finally:
            self._exchange(decay)
        self._update_working_weights()

    @torch.no_grad()
    def _exchange(self, decay: float) -> None:
        """Exchange the values of fp32 weights and average on this rank."""
        for flat, average in self._averages[decay].items():
            weights, values = flat.detach().view(-1), average.view(-1)
            for start in range(0, len(values), CHUNK):
                weight, value = weights[start : start + CHUNK], values[start : start + CHUNK]
                kept = weight.clone()
                weight.copy_(value)
                value.copy_(kept)

    def fragments(self) -> Iterator[Fragment]:
        """As `ZeroState.fragments`, and this rank's part of the averages."""
        yield from super().fragments()
        for decay, averages in self._averages.items():
            for shard in self.own_shards():
                stop = shard.start + shard.length
                values = shard.view(averages[shard.flat])
                yield Fragment(
                    shard.name, average_kind(decay), shard.shape, shard.start, stop, values
                )

    def scalars(self) -> dict[str, float]:
        """As `ZeroState.scalars`, and how many steps each average has seen."""
        seen = {average_kind(decay): float(count) for decay, count in self._seen.items()}
        return super().scalars() | seen

    def load(self, reader: FragmentReader, scalars: dict[str, float]) -> None:
        """As `ZeroState.load`; an average that was not kept before begins at the next step."""
        super().load(reader, scalars)
        for decay, averages in self._averages.items():
            kind = average_kind(decay)
            seen = scalars.get(kind, 0.0)
            self._seen[decay].fill_(seen)
            for shard in self.shards():
                values = shard.view(averages[shard.flat])
                if seen:
                    stop = shard.start + shard.length
                    values.copy_(reader.read(shard.name, kind, shard.start, stop))
                else:
                    values.zero_()

    def state_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """As `ZeroState.state_shapes`, and the averages."""
        return {
            name: kinds | {average_kind(decay): kinds["weight"] for decay in self._averages}
            for name, kinds in super().state_shapes().items()
        }
