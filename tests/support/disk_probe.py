"""A rank whose disk refuses the files of some saves; run by `tests.support.ranks`.

python -m tests.support.disk_probe OUTCOMES RANK PATTERN ERRNO FILE.yaml PATTERN ERRNO FILE.yaml ...
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from nextpt.base.errors import UserError
from nextpt.config import load_config
from nextpt.train.run import run_training
from tests.support.file_operations import refusing


def main(outcomes: str, rank: str, *jobs: str) -> None:
    messages: list[str | None] = []
    for pattern, number, file in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        try:
            with (
                refusing(pattern, int(number))
                if pattern and os.environ["RANK"] == rank
                else nullcontext()
            ):
                run_training(load_config(file))
            messages.append(None)
        except UserError as error:
            messages.append(str(error))
    if os.environ["RANK"] == "0":
        Path(outcomes).write_text(json.dumps(messages))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
