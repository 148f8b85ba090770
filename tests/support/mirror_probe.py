"""A rank whose connection to the store is cut for some steps.

See tests/distributed/test_mirror.py.

    python -m tests.support.mirror_probe SWITCH CONFIG.yaml

Rank 0 writes "STEP" to SWITCH after each step and waits until it is gone.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from nextpt.config import load_config
from nextpt.job.context import JobContext
from nextpt.train.run import run_training


def main(switch: str, file: str) -> None:
    record_step = JobContext.record_step

    def record_and_wait(self: JobContext, step: int) -> None:
        record_step(self, step)
        if os.environ["RANK"] == "0" and step:
            Path(switch + ".tmp").write_text(str(step))
            os.rename(switch + ".tmp", switch)
            while Path(switch).exists():
                time.sleep(0.01)

    JobContext.record_step = record_and_wait
    run_training(load_config(file))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
