"""One of three gloo ranks: collectives over the world and a subgroup, votes on failures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nextpt.base.collective import (
    RankGroup,
    check_same_on_all_ranks,
    run_on_all_ranks,
    run_on_all_ranks_or_stop,
    run_on_rank_0,
)
from nextpt.base.errors import CheckpointSaveError, DataError, RunInUseError, UserError


def outcome(action: Callable[[], Any]) -> Any:
    """Result of an action, or [class, message, exit code, every_rank] of its UserError."""
    try:
        return action()
    except UserError as error:
        return [type(error).__name__, str(error), error.exit_code, error.every_rank]


def raise_on(rank: int, group: RankGroup, error: Exception) -> int:
    """Raise on one rank; the others return their rank."""
    if group.rank == rank:
        raise error
    return group.rank


def main(folder: Path) -> None:
    """Write the results of this rank to folder/RANK.json."""
    dist.init_process_group("gloo")
    world = RankGroup.world()
    rank = world.rank
    disk_full = OSError(28, "No space left on device", "/disk")
    results = {
        "gathered": world.all_gather({"rank": rank, "text": "x" * rank}),
        "broadcast": world.broadcast([rank, None, 1.5]),
        "any": world.any_of(rank == 2, False, True),
        "duplicate": world.duplicate().all_gather(rank),
        "rank 0": run_on_rank_0(world, lambda: {"from": rank}),
        "rank 0 fails": outcome(
            lambda: run_on_rank_0(world, lambda: raise_on(0, world, RunInUseError("taken")))
        ),
        "own result": run_on_all_ranks(world, lambda: 10 * rank),
        "stop": run_on_all_ranks_or_stop(world, lambda: rank, lambda: rank == 1),
        "one fails": outcome(
            lambda: run_on_all_ranks(world, lambda: raise_on(1, world, DataError("bad shard")))
        ),
        "disk full": outcome(
            lambda: run_on_all_ranks(world, lambda: raise_on(0, world, disk_full))
        ),
        "with arguments": outcome(
            lambda: run_on_all_ranks(
                world, lambda: raise_on(2, world, CheckpointSaveError("no room", 2, 28))
            )
        ),
        "alike": outcome(lambda: check_same_on_all_ranks(world, {"a": 1})),
        "unlike": outcome(lambda: check_same_on_all_ranks(world, {"a": 1, "b": int(rank == 1)})),
    }
    members = dist.new_group([1, 2], backend="gloo")
    if rank:
        part = RankGroup(members)
        second = part.duplicate()
        results["subgroup"] = [
            [part.rank, part.world_size],
            part.all_gather(rank),
            second.all_gather(10 * rank),
            second.any(rank == 2),
            run_on_rank_0(second, lambda: rank),
            outcome(lambda: run_on_all_ranks(part, lambda: raise_on(1, part, DataError("bad")))),
        ]
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier(group=dist.group.WORLD)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
