"""Memory that a save or a load takes on each rank.

`python -m tests.support.state_memory save|load CONFIG OUT` under RANK, WORLD_SIZE, ...

Nothing is trained: the state is that of a model that was just drawn. Each rank writes
OUT-RANK.json: bytes of its share of the state and of the whole, growth of its resident memory at
the highest point of the save or load, which are verified too, and the checkpoint's files that it
still maps afterwards.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

from kernels.bench.machine import measure_peak


def main(mode: str, path: str, out: str) -> None:
    from nextpt.base.collective import RankGroup
    from nextpt.checkpoint.commit import save
    from nextpt.checkpoint.selection import select_checkpoint
    from nextpt.config import load_config
    from nextpt.train.checkpointing import restore_engine
    from nextpt.train.engine import Engine
    from nextpt.train.process_group import start_distributed
    from nextpt.train.random_states import get_rng_state

    config = load_config(path)
    device = start_distributed()
    group, engine, root = RankGroup.world(), Engine(config, device), config.run_dir / "checkpoints"
    share = sum(4 * fragment.tensor.numel() for fragment in engine.state.fragments())
    checkpoints = []

    def load() -> None:
        checkpoint = select_checkpoint(root, "auto", group, print)
        checkpoints.append(checkpoint)
        restore_engine(engine, checkpoint, group)

    group.all_gather(None)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    action = (
        load
        if mode == "load"
        else lambda: save(
            root,
            engine.state,
            {"step": 1, "config": config.model_dump(mode="json")},
            get_rng_state(),
            group,
        )
    )
    grown = measure_peak("cpu", action)
    mapped = sorted(
        {
            line.split()[-1]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if str(root) in line
        }
    )
    figures = {
        "share": share,
        "whole": sum(group.all_gather(share)),
        "grown": grown,
        "mapped": mapped,
    }
    Path(f"{out}-{group.rank}.json").write_text(json.dumps(figures))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
