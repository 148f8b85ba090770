"""Mesh: named process groups of a rank."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from nextpt.parallel.mesh import Mesh


def test_a_mesh_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="start_distributed"):
        Mesh.create()


def test_a_process_by_itself_is_rank_0_of_every_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = Mesh.create()
        assert (mesh.rank, mesh.world_size, mesh.data_rank, mesh.data_size) == (0, 1, 0, 1)
    finally:
        dist.destroy_process_group()
