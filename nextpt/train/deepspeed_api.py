"""DeepSpeed's entry points: the only module that imports deepspeed.

Differences from DeepSpeed's defaults:

- Its JIT-built shared-memory collective is off on CPUs. A process that is killed while it builds
  leaves a lock on which every later run hangs. gloo alone gives the same losses and needs no
  compiler. Which other ops could be compiled is not asked either: that runs the compiler too.
- Its host-side checks of the gradient norm are off. They synchronise in every step and skip steps
  silently. Clipping and the guard run in our optimizers, on the device (nextpt/optim).
- Its checkpoints are not used (nextpt/checkpoint).
- Its autotuner and its Muon are not used either. What only they import is left out, as it is a
  quarter of a rank's start: MLflow, where it is installed, and torch's compiler.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn

# DeepSpeed reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, message=".*(reduce_scatter|all_gather).*")


@contextmanager
def _import_refused(name: str) -> Iterator[None]:
    """Let the block import a package that was not imported before as if it were not installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # import then raises ImportError
    try:
        yield
    finally:
        del sys.modules[name]


with _import_refused("mlflow"):  # by the autotuner, for every rank
    import deepspeed
from deepspeed.runtime import compiler  # noqa: E402  # after the import above


def _leave_uncompiled(*_: Any, **__: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda function: function


# DeepSpeed's Muon alone decorates with this, when the first engine is built.
compiler.compile = _leave_uncompiled

# It warns of what this project does on purpose: training on a CPU, and optimizers of its own.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

VERSION: str = deepspeed.__version__
SHARED_MEMORY_OP = "deepspeed_shm_comm"  # the only op that a process group asks for


def op_names() -> tuple[list[str], list[str]]:
    """Names of the DeepSpeed ops that could be compiled here, and of the prebuilt ones."""
    compatible = sorted(name for name, fits in deepspeed.ops.__compatible_ops__.items() if fits)
    installed = deepspeed.git_version_info.installed_ops
    return compatible, sorted(name for name, is_built in installed.items() if is_built)


def init_process_group(backend: str, timeout_minutes: float) -> None:
    """Create torch's default process group through DeepSpeed.

    Raises:
        RuntimeError: The ranks cannot connect.
        OSError: The ranks cannot connect.
    """
    if backend == "gloo":
        # Set, not changed: reading it would compile test programs for every op of DeepSpeed.
        deepspeed.ops.__compatible_ops__ = {SHARED_MEMORY_OP: False}
    deepspeed.init_distributed(
        dist_backend=backend, timeout=timedelta(minutes=timeout_minutes), verbose=False
    )


def initialize(
    module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Any:
    """DeepSpeed's engine around a module and an optimizer."""
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return engine


def partitioned_construction(settings: dict[str, Any]) -> AbstractContextManager[Any]:
    """Context in which ZeRO-3 divides each layer among the ranks as soon as it is built.

    So a model that is larger than one device can be built.
    """
    context: AbstractContextManager[Any] = deepspeed.zero.Init(config_dict_or_path=settings)
    return context


def disable_host_gradient_checks() -> None:
    """Switch off DeepSpeed's search for infinities in the gradient norm, which reads the device.

    The optimizers of nextpt/optim make the same decision on the device.
    """
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (bf16_optimizer, stage3, stage_1_and_2):
        if not hasattr(module, "is_invalid_grad_norm"):
            raise RuntimeError(
                f"{module.__name__} of DeepSpeed {deepspeed.__version__} has no"
                " is_invalid_grad_norm; install a version within the bounds of pyproject.toml"
            )
        module.is_invalid_grad_norm = _is_never_invalid


def _is_never_invalid(norm: object) -> bool:
    return False
