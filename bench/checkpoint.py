"""Benchmark of saves: stall of training, time until durable, hashing, verification, retention.

    python -m bench.checkpoint [--mib 512] [--rounds 5] [--folder DIR] [--json FILE]

One rank, a state of --mib MiB. Medians over the rounds. `copy` is a plain copy of the state, made
in the same round: the shortest possible stall of an asynchronous save. `work kept` is the share of
its pace that a loop of matrix products keeps while a save is written.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

from kernels.bench.machine import describe_machine, write_json
from nextpt.base.collective import RankGroup
from nextpt.checkpoint.manager import CheckpointManager
from nextpt.checkpoint.manifest import describe
from nextpt.checkpoint.state import Fragment
from nextpt.checkpoint.verification import verify_checkpoint
from nextpt.config import CheckpointSection

KINDS = ("weight", "exp_avg", "exp_avg_sq")
ROWS, COLUMNS = 1024, 2048


class State:
    """Matrices of 8 MiB, three kinds each, as a ZeRO share of one rank has them."""

    def __init__(self, mib: int) -> None:
        flat = torch.randn(ROWS * COLUMNS)
        self.values = {
            (f"w{i}", kind): flat + i for i in range(max(1, mib // 24)) for kind in KINDS
        }

    def fragments(self) -> Iterator[Fragment]:
        """All matrices, whole."""
        for (name, kind), tensor in self.values.items():
            yield Fragment(name, kind, (ROWS, COLUMNS), 0, tensor.numel(), tensor)

    def scalars(self) -> dict[str, float]:
        """None."""
        return {}

    def state_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Three kinds of state of every matrix."""
        return {name: dict.fromkeys(KINDS, (ROWS, COLUMNS)) for name, _ in self.values}


def timed(action: Callable[[], object]) -> float:
    """Duration of an action in seconds."""
    start = time.monotonic()
    action()
    return time.monotonic() - start


def products(until: Callable[[], bool]) -> float:
    """Matrix products per second until `until` returns true."""
    matrix, count, start = torch.randn(256, 256), 0, time.monotonic()
    while not until():
        matrix @ matrix
        count += 1
    return count / (time.monotonic() - start)


def one_round(folder: Path, state: State) -> dict[str, float]:
    """Seconds of each part, and the share of the pace that work keeps."""
    seconds = {"copy": timed(lambda: [t.clone() for t in state.values.values()])}
    managers = {
        wait: CheckpointManager(
            folder, CheckpointSection(asynchronous=not wait, keep_last=2), RankGroup.world(), print
        )
        for wait in (True, False)
    }
    managers[True].resume()
    saved = [managers[True].save(state, {"step": step}, {})[0] for step in (1, 2)]
    seconds |= {"save": saved[1].seconds, "stall of a plain save": saved[1].stall_seconds}
    seconds["hashing"] = sum(
        timed(lambda path=path: describe(path)) for path in saved[1].checkpoint.folder.iterdir()
    )
    seconds["verify"] = timed(
        lambda: verify_checkpoint(saved[1].checkpoint.folder, RankGroup.world())
    )
    end = time.monotonic() + 2
    free = products(lambda: time.monotonic() > end)
    managers[False].resume()
    managers[False].save(state, {"step": 3}, {}, wait=False)
    saves: list = []
    busy = products(lambda: bool(saves.extend(managers[False].poll()) or saves))
    return seconds | {
        "stall in the background": saves[0].stall_seconds,
        "background save": saves[0].seconds,
        "work kept": busy / free,
    }


def main() -> None:
    """Run the benchmark and print its medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="on the file system to measure; a temporary one unless given"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = State(options.mib)
    rounds = []
    for _ in range(options.rounds):
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            rounds.append(one_round(folder / "checkpoints", state))
        finally:
            shutil.rmtree(folder)
    result = {name: median(seconds[name] for seconds in rounds) for name in rounds[0]}
    size = sum(t.numel() * 4 for t in state.values.values()) / 2**20
    print(f"{size:.0f} MiB, medians of {options.rounds} rounds (lowest to highest)")
    for name, value in result.items():
        values = [seconds[name] for seconds in rounds]
        unit = "" if name == "work kept" else " s"
        print(f"{name:<28} {value:8.3f}{unit:<2} ({min(values):.3f} to {max(values):.3f})")
    print(f"stall / copy                 {result['stall in the background'] / result['copy']:8.2f}")
    print(f"hashing / background save    {result['hashing'] / result['background save']:8.2f}")
    assert all(math.isfinite(value) for value in result.values())
    if options.json:
        write_json(
            options.json,
            {"machine": describe_machine("cpu"), "mib": size, "rounds": rounds, "median": result},
        )


if __name__ == "__main__":
    main()
