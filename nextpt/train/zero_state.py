"""ZeRO state as fragments: this rank's part of weights and optimizer state, for checkpoints.

At every stage a parameter's fp32 weights, and the optimizer's state of them, are ranges of flat
tensors that the optimizer steps. Only how a range is found differs: at stage 0 the parameter itself
is the flat tensor; at stages 1 and 2 DeepSpeed links each parameter to its range; at stage 3 every
parameter is divided into equal, padded shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nextpt.checkpoint.state import Fragment, FragmentReader
from nextpt.optim.guarded import GuardedOptimizer, Shard
from nextpt.parallel.mesh import Mesh

# Attribute of a DeepSpeed ZeRO optimizer (stage 3, bf16 stage 1, stages 1 and 2) that holds the
# flat fp32 tensors of this rank, one per group.
FLAT_PARTITIONS = (
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
    "single_partition_of_fp32_groups",
)


class ZeroState:
    """The `ShardedState` of a model that DeepSpeed trains.

    Args:
        parameters: Name -> parameter of the working weights.
        optimizer: The optimizer that DeepSpeed steps.
        zero: DeepSpeed's ZeRO optimizer around it; None at stage 0.
        stage: ZeRO stage.
        mesh: Process groups of this rank.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: GuardedOptimizer,
        zero: Any | None,
        stage: int,
        mesh: Mesh,
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.zero = zero
        self.stage = stage
        self.mesh = mesh
        optimizer.attach(self._flat_tensors(), self.shards())
        shapes = {name: full_shape(parameter) for name, parameter in parameters.items()}
        optimizer.connect(shapes, self._units(), mesh.data)

    def shards(self) -> Iterator[Shard]:
        """The parts of parameters that the optimizer of this rank steps."""
        for name, parameter in self.parameters.items():
            shard = self._shard(name, parameter)
            if shard is not None and shard.length > 0:
                yield shard

    def own_shards(self) -> Iterator[Shard]:
        """Shards of which over all ranks every element comes exactly once.

        At stage 0, where every rank steps every parameter, each takes an equal share of each.
        """
        for shard in self.shards():
            if self.stage > 0:
                yield shard
                continue
            share = -(-shard.length // self.mesh.data_size)
            start = min(self.mesh.data_rank * share, shard.length)
            length = min(share, shard.length - start)
            if length > 0:
                yield Shard(shard.name, shard.shape, shard.flat, start, start, length)

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of the fp32 weights and the optimizer's state. Gathers nothing.

        State that does not have its parameter's shape comes from the rank whose copy counts, or
        from that with the first element.
        """
        for shard in self.own_shards():
            state = self.optimizer.shard_state(shard)
            yield _fragment(shard, "weight", shard.view(shard.flat))
            for kind in self.optimizer.kinds(shard):
                if kind.is_elementwise(shard.shape):
                    yield _fragment(shard, kind.name, state[kind.name])
        for shard in self.shards():
            if self._saves_whole_state(shard):
                yield from self._whole_fragments(shard)

    def _saves_whole_state(self, shard: Shard) -> bool:
        owner = self.optimizer.owner(shard.name)
        if owner is not None:
            return owner == self.mesh.data_rank
        return shard.start == 0 and (self.stage > 0 or self.mesh.data_rank == 0)

    def _whole_fragments(self, shard: Shard) -> Iterator[Fragment]:
        state = self.optimizer.shard_state(shard)
        for kind in self.optimizer.kinds(shard):
            if not kind.is_elementwise(shard.shape):
                value, shape = state[kind.name].reshape(-1), kind.shape(shard.shape)
                yield Fragment(shard.name, kind.name, shape, 0, value.numel(), value.float())

    def scalars(self) -> dict[str, float]:
        """The optimizer's numbers that belong to no parameter."""
        return self.optimizer.scalars()

    def load(self, reader: FragmentReader, scalars: dict[str, float]) -> None:
        """Read this rank's ranges in place, then derive the working weights from them."""
        with torch.no_grad():
            for shard in self.shards():
                stop = shard.start + shard.length
                shard.view(shard.flat).copy_(reader.read(shard.name, "weight", shard.start, stop))
                for kind in self.optimizer.kinds(shard):
                    state = self.optimizer.shard_state(shard)[kind.name]
                    if kind.is_elementwise(shard.shape):
                        state.copy_(reader.read(shard.name, kind.name, shard.start, stop))
                    else:
                        values = reader.read(shard.name, kind.name, 0, state.numel())
                        state.copy_(values.view(state.shape))
            self.optimizer.load_scalars(scalars)
        self._update_working_weights()

    def state_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Full shape of every kind of value of every parameter. A tied matrix appears once."""
        spec = self.optimizer.spec
        shapes = {name: full_shape(parameter) for name, parameter in self.parameters.items()}
        return {
            name: {"weight": shape} | spec.state_shapes(name, shape)
            for name, shape in shapes.items()
        }

    def _update_working_weights(self) -> None:
        if self.zero is None:
            return
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        # As DeepSpeed's load_checkpoint: whatever is gathered, parameters that always stay so
        # included, and hpZ's copies hold the weights from before
        self.zero.checkpoint_event_prologue()
        for group in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero.checkpoint_event_epilogue()

    def _flat_tensors(self) -> list[Tensor]:
        """The fp32 tensors of this rank that the optimizer steps."""
        if self.zero is None:
            return [p for group in self.optimizer.param_groups for p in group["params"]]
        for attribute in FLAT_PARTITIONS:
            if hasattr(self.zero, attribute):
                partitions: list[Tensor] = getattr(self.zero, attribute)
                return partitions
        raise AssertionError(
            f"{type(self.zero).__name__} holds no known fp32 partitions; see deepspeed's version"
            " bounds"
        )

    def _units(self) -> list[list[Tensor]]:
        """Tensors of a parameter group that DeepSpeed steps in one call; see `connect`.

        At stage 0 these are all parameters of a group, later its flat partition or one of them.
        """
        if self.zero is None:
            return [list(group["params"]) for group in self.optimizer.param_groups]
        return [[flat] for flat in self._flat_tensors()]

    def _shard(self, name: str, parameter: nn.Parameter) -> Shard | None:
        """The part of a parameter that this rank steps; None where it steps nothing of it."""
        shape = full_shape(parameter)
        if self.zero is None:
            return Shard(name, shape, parameter, 0, 0, parameter.numel())
        if self.stage < 3:
            return self._linked_shard(name, shape, parameter)
        return self._equal_shard(name, shape, parameter)

    def _linked_shard(self, name: str, shape: tuple[int, ...], parameter: Any) -> Shard | None:
        """Stages 1 and 2: DeepSpeed links the parameter to its range of a flat partition."""
        link = parameter._hp_mapping
        if link is None:
            return None
        return Shard(
            name,
            shape,
            flat=self._flat_tensors()[link.param_group_index],
            offset=link.hp_fragment_address.start,
            start=link.lp_fragment_address.start,
            length=link.lp_fragment_address.numel,
        )

    def _equal_shard(self, name: str, shape: tuple[int, ...], parameter: Any) -> Shard:
        """Stage 3: equal shares, those of the last ranks padded."""
        assert self.zero is not None
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        share = parameter.ds_tensor.ds_numel
        start = self.mesh.data_rank * share
        return Shard(
            name,
            shape,
            flat=self._flat_tensors()[group],
            offset=offset,
            start=start,
            length=min(share, parameter.ds_numel - start),
        )


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Full shape of a parameter; under ZeRO-3 its own shape is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _fragment(shard: Shard, kind: str, values: Tensor) -> Fragment:
    return Fragment(
        name=shard.name,
        kind=kind,
        shape=shard.shape,
        start=shard.start,
        stop=shard.start + shard.length,
        tensor=values.float(),
    )
