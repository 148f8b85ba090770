"""Cost of the guard per step, and distance of a run's steps from its limits.

    python -m bench.guard [--device cpu] [--steps 2000] [--run RUN --window 128]

`judge`: microseconds per step from its loss to the verdict on the device; median of 20
parts. With --run, how far the logged steps of a run lay above the median of those before them: in
standard deviations (as the guard estimates them, without its floors) and, for the gradient norm, as
a factor. A run with train.log_every=1 logs all steps.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from kernels.bench.machine import describe_machine, synchronize
from nextpt.config import GuardSection
from nextpt.events import read_events
from nextpt.train.spike_detector import NORMAL, SpikeDetector

PARTS = 20


def judging(device: str, steps: int) -> float:
    """Return the microseconds of a step."""
    detector, seconds = SpikeDetector(GuardSection(), torch.device(device)), []
    loss, z_loss, norm = torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64, device=device)
    for _ in range(PARTS + 1):
        detector.read()
        synchronize(device)
        started = time.perf_counter()
        for _ in range(steps // PARTS):
            detector.classify(loss, z_loss, norm)
        synchronize(device)
        seconds.append((time.perf_counter() - started) / (steps // PARTS))
    return 1e6 * median(seconds[1:])


def heights(run: Path, window: int) -> list[tuple[int, float, float, float]]:
    """Measure each logged step that has `window` others before it.

    Returns:
        (step, standard deviations of the loss, of the log norm, norm / its median) of each.
    """
    events = [
        e
        for e in read_events(run / "metrics.jsonl", "train")
        if math.isfinite(e["loss"]) and 0 < e["grad_norm"] < math.inf
    ]
    values, steps_measured = np.array([[e["loss"], math.log(e["grad_norm"])] for e in events]), []
    for number in range(window, len(values)):
        last = values[number - window : number]
        centre = np.median(last, axis=0)
        above = values[number] - centre
        loss, norm = above / (NORMAL * np.median(np.abs(last - centre), axis=0))
        steps_measured.append(
            (events[number]["step"], float(loss), float(norm), math.exp(above[1]))
        )
    return steps_measured


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--window", type=int, default=GuardSection().window)
    arguments = parser.parse_args()
    print(
        ", ".join(f"{name} {value}" for name, value in describe_machine(arguments.device).items())
    )
    print(f"detector: {judging(arguments.device, max(arguments.steps, PARTS)):.0f} us a step")
    steps_measured = heights(arguments.run, arguments.window) if arguments.run else []
    for column, label in enumerate(
        (
            "standard deviations of the loss",
            "standard deviations of log grad norm",
            "times the median grad norm",
        ),
        1,
    ):
        top = sorted(steps_measured, key=lambda step: step[column])[-3:]
        (
            print(
                f"highest of {len(steps_measured)} steps, {label}:",
                ", ".join(f"{step[column]:.2f} (step {step[0]})" for step in reversed(top)),
            )
            if steps_measured
            else None
        )


if __name__ == "__main__":
    main()
