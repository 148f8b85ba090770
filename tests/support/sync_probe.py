"""Host synchronisations in optimizer steps, counted.

`python -m tests.support.sync_probe CONFIG.yaml ...` prints JSON.
"""

from __future__ import annotations

import json
import sys
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What .item(), bool(tensor) and the like call on every device.
SYNCHRONISING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
}


class Watch(TorchDispatchMode):
    """Records where the host waited for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in SYNCHRONISING:
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            self.places.append(f"{frames[-1].filename}:{frames[-1].lineno}")
        return func(*args, **(kwargs or {}))


def probe(path: str) -> list[str]:
    from nextpt.config import load_config
    from nextpt.data.loader import Loader
    from nextpt.train.engine import Engine
    from nextpt.train.process_group import start_distributed
    from tests.support.trainers import bare_trainer

    config = load_config(path)
    engine = Engine(config, start_distributed())
    loader = Loader(config, 0, 1)
    trainer = bare_trainer(config, engine, loader)
    trainer.train_step(0)  # the first builds buffers
    with Watch() as watch:
        assert torch.ones(1).item() == 1 and len(watch.places) == 1, "the watch sees nothing"
        watch.places.clear()
        trainer.train_step(1)
        trainer.train_step(2)
    loader.close()
    return watch.places


if __name__ == "__main__":
    print(json.dumps({path: probe(path) for path in sys.argv[1:]}))
