"""Training jobs on the CPU with the choice of attention that a GPU has, one after another.

`python -m tests.support.kernel_choice_probe CACHE DEVICE CONFIG [DEVICE CONFIG ...]`. The
candidates of attention are torch's and the reference, and in the trials the former crashes; the
loss has none but torch's. DEVICE is what the device is said to be.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

from nextpt.config import Config, load_config
from nextpt.train import kernel_choice, run

PATHS = {
    "sdpa": "tests.support.fake_attention:crashing",
    "reference": "kernels.attention.reference:run",
}


def candidates(config: Config, operator: str, device: str) -> list[str]:
    return [*PATHS] if operator == "attention" else ["torch"]


def main(cache: str, *jobs: str) -> None:
    for name, path in zip(jobs[::2], jobs[1::2], strict=True):
        with (
            patch.object(kernel_choice, "MEASURED", ("cpu",)),
            patch.object(kernel_choice, "candidates", candidates),
            patch.object(kernel_choice.attention_trial, "function_paths", lambda: PATHS),
            patch.object(kernel_choice, "cache_file", lambda: Path(cache)),
            patch.object(run, "host_and_device", lambda device, name=name: ("host", name)),
        ):
            run.run_training(load_config(path))


if __name__ == "__main__":
    main(*sys.argv[1:])
