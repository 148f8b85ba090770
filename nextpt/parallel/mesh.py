"""Device mesh: the named process groups over which ranks communicate.

Every collective names its group. A collective over the world by default would be wrong as soon as
ranks divide a sequence or a tensor instead of the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """Process groups that this rank belongs to.

    Attributes:
        world: All ranks of the job.
        data: Ranks that hold the same model and train on different data. Gradients, losses and
            metrics are summed over it.
    """

    world: dist.ProcessGroup
    data: dist.ProcessGroup

    @classmethod
    def create(cls) -> Mesh:
        """The mesh of a job that is parallel over data alone, on torch's default process group.

        Raises:
            ValueError: torch.distributed is not initialised.
        """
        world = dist.group.WORLD
        if world is None:
            raise ValueError("torch.distributed is not initialised: call start_distributed first")
        return cls(world=world, data=world)

    @property
    def rank(self) -> int:
        """Rank of this process in the world."""
        return dist.get_rank(self.world)

    @property
    def world_size(self) -> int:
        """Number of ranks of the world."""
        return dist.get_world_size(self.world)

    @property
    def data_rank(self) -> int:
        """Rank of this process in the data group."""
        return dist.get_rank(self.data)

    @property
    def data_size(self) -> int:
        """Number of ranks that divide the data among them."""
        return dist.get_world_size(self.data)
