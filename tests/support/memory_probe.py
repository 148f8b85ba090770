"""Measured memory of one rank: prints JSON; `python -m tests.support.memory_probe CONFIG.yaml`.

The growth of resident memory from before the engine is built to the highest point of four training
steps.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from nextpt.config import Config, to_yaml
from tests.support.ports import free_port


def measure(config: Config, world_size: int, folder: Path) -> int:
    """Bytes of rank 0's peak over its start; runs `world_size` gloo ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "probe.yaml").write_text(to_yaml(config))
    port, processes = str(free_port()), []
    for rank in range(world_size):
        # One arena: glibc's default of one per thread keeps freed memory that another thread could
        # have used.
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.support.memory_probe", str(folder / "probe.yaml")],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=1500) for process in processes]
    if any(process.returncode for process in processes):
        raise AssertionError("\n".join(err[-2000:] for _, err in outputs))
    return json.loads(outputs[0][0].splitlines()[-1])["bytes"]


def _resident(field: str) -> int:
    return (
        int(
            re.search(
                rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE
            )[1]
        )
        * 1024
    )


def _train(config: Config, steps: int) -> None:
    from nextpt.data.loader import Loader
    from nextpt.train.engine import Engine
    from tests.support.trainers import bare_trainer

    loader = Loader(config, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    trainer = bare_trainer(config, Engine(config, torch.device("cpu")), loader)
    for step in range(steps):
        trainer.train_step(step)
    loader.close()


def _probe(path: str) -> int:
    from nextpt.config import load_config
    from nextpt.train.process_group import start_distributed

    config = load_config(path)
    start_distributed()
    # A tiny run first: libraries that load with the first step are not the model's memory.
    _train(
        config.model_copy(
            update={
                "model": config.model.model_copy(update={"width": 32, "depth": 1, "head_dim": 8})
            }
        ),
        2,
    )
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now
    before = _resident("VmRSS")
    _train(config, 3)
    return _resident("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps({"bytes": _probe(sys.argv[1])}), flush=True)
    os._exit(0)
